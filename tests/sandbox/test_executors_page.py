"""The page on executors: its Python runs, its commands are commands, its tables name what there is."""

from __future__ import annotations

import re
import shlex
import typing
from pathlib import Path

from ctrl_hpc import cli
from ctrl_hpc.records import TestStatus
from ctrl_hpc.sandbox import judge as special
from ctrl_hpc.sandbox.judge import COMPARISONS

PAGE = (Path(__file__).parents[2] / "docs/executors.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_runs(tmp_path: Path) -> None:
    example, judge = blocks("python")
    exec(compile(example, "executors.md", "exec"), {})
    (tmp_path / "judges.py").write_text(judge)
    divisor = special.load({"divisor": f"{tmp_path}/judges.py:divisor"})["divisor"]
    assert [divisor(answer, b"", b"12\n") for answer in (b"4\n", b"5\n", b"four\n")] == [True, False, False]


def test_the_commands_are_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ctrl-hpc ")]
    inline = re.findall(r"`(ctrl-hpc [^`]+)`", PAGE)
    assert len(lines) == 2 and len(inline) == 4
    for line in [*lines, *inline]:
        cli._parse(shlex.split(line)[1:])


def names(heading: str) -> list[str]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)`", section, re.MULTILINE)


def test_the_tables_are_whole() -> None:
    def literals(kind: typing.Any) -> set[str]:
        return {name for item in typing.get_args(kind) for name in (literals(item) or {item})}

    assert set(names("Verdicts")) == literals(TestStatus)
    assert set(names("Comparison")) == set(COMPARISONS)
