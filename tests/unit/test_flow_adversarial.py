"""Adversarial tests: changed inputs, answered by the canonical solution, kept when they break a draft."""

import contextlib
import io
import random
import sys

import pytest

from ctrl_hpc import jsonl, pipeline
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.flow.adversarial import mutations, strengthen
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import execute
from ctrl_hpc.records import Generation, Limits, Problem, Rules, Solution, StdinTest, TestResult, Verdict
from ctrl_hpc.records.verdicts import answered
from ctrl_hpc.sandbox import Sandbox

CANONICAL = "print(abs(int(input())))"
RIGHT_ON_THE_TESTS = "n = int(input())\nprint(n if n >= -5 else 0) if n > 0 else print(-n if n > -8 else 0)"
WRONG = "print(int(input()))"
PROBLEM = Problem(
    id="p",
    source="ours",
    split="train",
    prompt="Print the absolute value.",
    tests=(StdinTest(stdin="-7\n", expected_stdout="7\n"), StdinTest(stdin="3\n", expected_stdout="3\n")),
    canonical_solution=CANONICAL,
)


class InProcess:
    """Runs the harmless programs of this test in its own process."""

    def __init__(self):
        self.runs = 0

    def run_many(self, executions):
        return [answered(item, self._run(item)) for item in executions]

    def _run(self, item):
        results = []
        for test in item.tests:
            self.runs += 1
            out = io.StringIO()
            before, sys.stdin = sys.stdin, io.StringIO(test.stdin)
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(item.program, "program", "exec"), {})
                status = "accepted" if out.getvalue().split() == test.expected_stdout.split() else "wrong_answer"
            except ValueError:
                status = "runtime_error"
            finally:
                sys.stdin = before
            results.append(TestResult(status=status, stdout=out.getvalue().encode()))
        worst = next((result.status for result in results if result.status != "accepted"), "accepted")
        return Verdict(status=worst, tests=tuple(results))


def drafts(*programs):
    made = [Solution(id=f"p/{k}", problem_id="p", text="", program=text) for k, text in enumerate(programs)]
    return execute([(PROBLEM, item) for item in made], InProcess(), Rules())


def test_a_number_is_changed_and_a_count_is_not():
    changed = mutations("3\n10 -20 30\n", 8, random.Random(0))
    assert len(changed) == 8
    assert all(text.startswith("3\n") and text.count(" ") == 2 for text in changed)
    assert all(sum(a != b for a, b in zip(text.split(), "3 10 -20 30".split(), strict=True)) == 1 for text in changed)
    assert mutations("no numbers, v2 only\n", 8, random.Random(0)) == []


def test_tests_are_added_that_break_a_draft_which_had_passed():
    executor = InProcess()
    right, wrong = drafts(RIGHT_ON_THE_TESTS, WRONG)
    assert right.verdict.accepted and not wrong.verdict.accepted
    agreeing = drafts(RIGHT_ON_THE_TESTS, WRONG, CANONICAL, CANONICAL)
    (stronger,) = strengthen([PROBLEM], agreeing, executor, Rules(), n=2, seed=0)
    added = stronger.tests[2:]
    assert stronger.tests[:2] == PROBLEM.tests
    assert 1 <= len(added) <= 2
    assert all(int(test.expected_stdout) == abs(int(test.stdin)) for test in added)
    (again,) = execute(
        [(stronger, Solution(id="p/0", problem_id="p", text="", program=RIGHT_ON_THE_TESTS))], executor, Rules()
    )
    assert not again.verdict.accepted
    assert strengthen([PROBLEM], agreeing, executor, Rules(), n=2, seed=0) == [stronger]


def test_an_input_on_which_the_passing_drafts_disagree_with_the_canonical_solution_is_not_used():
    executor = InProcess()
    disagreeing = drafts(RIGHT_ON_THE_TESTS, RIGHT_ON_THE_TESTS, RIGHT_ON_THE_TESTS, WRONG)
    (stronger,) = strengthen([PROBLEM], disagreeing, executor, Rules(), n=4, seed=0)
    right = Solution(id="p/0", problem_id="p", text="", program=RIGHT_ON_THE_TESTS)
    assert execute([(stronger, right)], executor, Rules())[0].verdict.accepted


@pytest.mark.parametrize(
    "problem",
    [
        Problem(id="p", source="o", split="train", prompt="", tests=PROBLEM.tests),
        Problem(id="p", source="o", split="train", prompt="", tests=PROBLEM.tests, canonical_solution="print(input.x)"),
    ],
)
def test_without_an_answer_nothing_is_added(problem):
    class Broken(InProcess):
        def _run(self, item):
            return Verdict(status="runtime_error", tests=tuple(TestResult(status="runtime_error") for _ in item.tests))

    executor = Broken() if problem.canonical_solution else InProcess()
    assert strengthen([problem], drafts(WRONG), executor, Rules(), n=3, seed=0) == [problem]


def test_with_the_real_executor():
    with Sandbox(workers=1) as sandbox:
        rules = Rules(limits=Limits(cpu_s=2.0, wall_s=4.0))
        made = [Solution(id="p/0", problem_id="p", text="", program=WRONG)]
        executed = execute([(PROBLEM, made[0])], sandbox, rules)
        (stronger,) = strengthen([PROBLEM], executed, sandbox, rules, n=3, seed=0)
        right = Solution(id="p/1", problem_id="p", text="", program=CANONICAL)
        again = execute([(stronger, right), (stronger, made[0])], sandbox, rules)
    added = stronger.tests[2:]
    assert added and all(int(test.expected_stdout) == abs(int(test.stdin)) for test in added)
    assert [item.verdict.accepted for item in again] == [True, False]


def test_the_stage_adds_them_once(tmp_path):
    jsonl.write(tmp_path / "train.jsonl", [PROBLEM])
    settings = ["data.name=jsonl", f"data.path={tmp_path / 'train.jsonl'}", "data.eval_names=[]", "sample.n_samples=4"]
    config = load(ROOT / "configs" / "tiny.yaml", [*settings, "sample.adversarial_tests=2", "prompts.folder=default"])

    class Connections:
        executor = InProcess()

        class generator:
            @staticmethod
            def complete(chats, sampling):
                texts = [RIGHT_ON_THE_TESTS, WRONG, CANONICAL, CANONICAL]
                return [[Generation(text=f"```python\n{text}\n```") for text in texts] for _ in chats]

    folder = tmp_path / "run"
    this = pipeline.prepare(config, folder, ["sample"])
    facts = pipeline.sample(this, Connections)
    assert 1 <= facts["adversarial_tests"] <= 2
    assert facts["pass_at_1"] == 0.5  # the draft that had passed the tests of the data set no longer does
    once = (folder / "problems" / "train.jsonl").read_text()
    (problem,) = jsonl.read(Problem, folder / "problems" / "train.jsonl")
    assert len(problem.tests) == 2 + facts["adversarial_tests"]
    this = pipeline.prepare(config, folder, ["sample"])
    assert pipeline.sample(this, Connections) == facts
    assert (folder / "problems" / "train.jsonl").read_text() == once
    assert Prompts.load("default").solution(problem) == Prompts.load("default").solution(PROBLEM)
