"""Rows as published, through loader, harness and sandbox: programs that the data sets' own graders accept are right."""

import json

import pytest

from ctrl_hpc.data import catalog
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import Rules
from ctrl_hpc.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as made:
        yield made


def contests(description, stdin, stdout):
    empty = {"input": [], "output": []}
    return {
        "name": "row",
        "description": description,
        "public_tests": {"input": [stdin], "output": [stdout]},
        "private_tests": empty,
        "generated_tests": empty,
        "solutions": {"language": [], "solution": []},
        "time_limit": {"seconds": 2, "nanos": 0},
        "memory_limit_bytes": 0,
    }


def taco(io, question="Do it."):
    return {"question": question, "solutions": "[]", "starter_code": "", "input_output": io}


def live(starter, *cases):
    return {
        "question_id": "1",
        "question_content": "Do it.",
        "contest_date": "2024-09-01T00:00:00",
        "starter_code": starter,
        "public_test_cases": json.dumps(list(cases)),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "mx"} if starter else {}),
    }


HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\ndef top(a: List[int]) -> int:\n    '''Largest.'''\n",
    "canonical_solution": "    return max(a)\n",
    "entry_point": "top",
    "test": "def check(candidate):\n    assert candidate([1, 3]) == 3\n",
}
SETS = (
    "import numpy as np\n\ndef is_floats(x) -> bool:\n    return isinstance(x, float)\n\n"
    "def assertion(out, exp, atol):\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
    "    out = set(out)\n    exp = set(exp)\n    if out != exp and atol != 0:\n        assert np.allclose(out, exp)\n"
    "    else:\n        assert out == exp\n\n"
    "inputs = [[(1, 2), (2, 3, 1)]]\nresults = [(1, 2)]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(both(*inp), exp, 0)\n"
)
EITHER = (
    "import math\n\ndef _other(x):\n    return x + 1\n\ndef assertion(out, exp_0, exp_1, atol):\n"
    "    assert out == exp_0 or out == exp_1\n\n"
    "inputs = [[1]]\nresults = [1]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(f(*inp), exp, _other(*inp), 0)\n"
)
PLUS = {"task_id": 2, "prompt": "Do it.", "code": "", "test_imports": [], "test_list": ["assert True"]}
HUGE = "7" * 5000
MANY = "".join(f"{number}\n" for number in range(1, 200_001))
CASES = {
    "a prompt's imports": (
        "humaneval",
        HUMAN,
        "def top(a: List[int]) -> int:\n    return max(a)",
        "def top(a):\n    return 1",
    ),
    "the starter's List": (
        "livecodebench",
        live("class Solution:\n    def mx(self, a):", {"input": "[1, 3]", "output": "3", "testtype": "functional"}),
        "class Solution:\n    def mx(self, a: List[int]) -> int:\n        return max(a)",
        "class Solution:\n    def mx(self, a: List[int]) -> int:\n        return 1",
    ),
    "a contest's imports": (
        "livecodebench",
        live("", {"input": "3\n", "output": "2\n", "testtype": "stdin"}),
        "print(floor(sqrt(int(input()) + 1)))",
        "print(floor(3))",
    ),
    "the statement's tolerance": (
        "codecontests",
        contests("The absolute error must be at most 10^{-2}.", "1\n", "1.50000000\n"),
        "print(1.501)",
        "print(1.52)",
    ),
    "any letter case": (
        "codecontests",
        contests("You can print every letter in any case.", "1\n", "YES\n"),
        "print('Yes')",
        "print('No')",
    ),
    "a long output": (
        "codecontests",
        contests("Count.", "200000\n", MANY),
        "for i in range(200000): print(i + 1)",
        "1",
    ),
    "a huge integer printed": (
        "codecontests",
        contests("A power.", "5000\n", "1" + "0" * 5000 + "\n"),
        "print(10 ** int(input()))",
        "print(10 ** 4999)",
    ),
    "a huge integer returned": (
        "taco",
        taco('{"fn_name": "sevens", "inputs": [[5000]], "outputs": [' + HUGE + "]}"),
        "def sevens(n):\n    return (10 ** n - 1) // 9 * 7",
        "def sevens(n):\n    return 7",
    ),
    "integer keys": (
        "taco",
        taco(json.dumps({"fn_name": "get", "inputs": [[{"1": 10, "2": 20}]], "outputs": [{"10": 1}]})),
        "def get(d):\n    return {d[1]: 1}",
        "def get(d):\n    return {d['1']: 1}",
    ),
    "text arguments are left out": (
        "taco",
        taco(json.dumps({"fn_name": "f", "inputs": ["N = 5", [5]], "outputs": [1, 5]})),
        "def f(n):\n    return n",
        "def f(n):\n    return 1",
    ),
    "sets": (
        "mbppplus",
        PLUS | {"test": SETS},
        "def both(a, b):\n    return (2, 1)",
        "def both(a, b):\n    return (2, 3)",
    ),
    "either of two": ("mbppplus", PLUS | {"test": EITHER}, "def f(x):\n    return 2", "def f(x):\n    return 3"),
}


@pytest.mark.parametrize("name", CASES)
def test_right_is_right_and_wrong_is_not(name, sandbox, tmp_path):
    data_set, row, right, wrong = CASES[name]
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = catalog.whole(data_set, str(tmp_path / "test.jsonl"), "test")
    verdicts = sandbox.run_many([execution(problem, program, Rules()) for program in (right, wrong)])
    assert verdicts[0].status == "accepted", verdicts[0].detail
    assert verdicts[1].status in ("wrong_answer", "runtime_error")


def test_the_function_that_is_called_is_named(tmp_path):
    io = json.dumps({"fn_name": "swap_letters", "inputs": [["ab"]], "outputs": ["ba"]})
    (tmp_path / "test.jsonl").write_text(json.dumps(taco(io)) + "\n")
    (problem,) = catalog.whole("taco", str(tmp_path / "test.jsonl"), "test")
    (message,) = Prompts.load("default").solution(problem)
    assert "assert swap_letters('ab') == 'ba'" in message.content


def test_another_right_answer_is_not_called_wrong(sandbox, tmp_path):
    row = contests("If there are several answers, print any of them.", "3\n", "1 2\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = catalog.whole("codecontests", str(tmp_path / "test.jsonl"), "test")
    programs = [execution(problem, program, Rules()) for program in ("print(1, 2)", "print(2, 1)")]
    assert [verdict.status for verdict in sandbox.run_many(programs)] == ["accepted", "unsupported"]
