"""Special judges: loaded from a file by name, asked by the executor, their code part of the verdict cache's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_hpc import config
from ctrl_hpc.records import Execution, Limits, StdinTest
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox import judge as special

JUDGE = """
def divisor(stdout, expected, stdin):
    return int(stdin) % int(stdout) == 0
"""
LIMITS = Limits(cpu_s=2.0, wall_s=20.0, memory_mb=128)


def answer(text: str, judge: str = "divisor") -> Execution:
    test = StdinTest(stdin="12\n", expected_stdout="")
    return Execution(program=f"print({text!r})", tests=(test,), limits=LIMITS, comparison=judge)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "judges.py"
    path.write_text(JUDGE)
    return path


def test_a_special_judge_judges_and_what_it_cannot_judge_is_unsupported(file: Path) -> None:
    with Sandbox(workers=1, judges=special.load({"divisor": f"{file}:divisor"})) as sandbox:
        verdicts = sandbox.run_many([answer("4"), answer("5"), answer("five"), answer("", "exact")])
        with pytest.raises(ValueError, match=r"comparison: 'other' is not one of exact, .*, divisor"):
            sandbox.submit(answer("4", "other"))
    assert [verdict.status for verdict in verdicts] == ["accepted", "wrong_answer", "unsupported", "accepted"]
    assert "divisor cannot judge this output: ValueError: invalid literal" in verdicts[2].detail


def test_a_changed_judge_judges_anew(file: Path, tmp_path: Path) -> None:
    statuses = []
    for text in (JUDGE, JUDGE, JUDGE.replace("== 0", "!= 0")):
        file.write_text(text)
        judges = special.load({"divisor": f"{file}:divisor"})
        with Sandbox(workers=1, cache_dir=tmp_path / "cache", judges=judges) as sandbox:
            statuses.append((sandbox.run_many([answer("4")])[0].status, sandbox.counts["cache_hits"]))
    assert statuses == [("accepted", 0), ("accepted", 1), ("wrong_answer", 0)]


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("divisor", "{file}", "is not FILE.py:FUNCTION"),
        ("exact", "{file}:divisor", "exact is a comparison already"),
        ("divisor", "{file}:other", "defines no function other"),
        ("divisor", "{file}x.py:divisor", "there is no file"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(file: Path, name: str, place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        special.load({name: place.format(file=file)})


def test_a_file_that_fails_is_named(file: Path) -> None:
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError: division by zero"):
        special.load({"divisor": f"{file}:divisor"})


def test_a_configuration_names_them(file: Path) -> None:
    loaded = config.load("configs/tiny.yaml", [f"executor.judges.divisor={file}:divisor"])
    assert loaded.executor.judges == {"divisor": f"{file}:divisor"}
    for place in (f"{file}", f"{file}x.py:divisor"):
        with pytest.raises(ValueError, match=r"executor\.judges\.divisor: .* is not allowed"):
            config.load("configs/tiny.yaml", [f"executor.judges.divisor={place}"])
