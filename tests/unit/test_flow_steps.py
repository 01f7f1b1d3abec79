"""Drafting, critiquing, revising and executing, against a scripted generator and executor."""

from dataclasses import replace

import pytest

from ctrl_hpc.flow.feedback import Hint
from ctrl_hpc.flow.oracle import OracleGenerator
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique, critique_with_hints, draft, execute, limits, revise
from ctrl_hpc.records import (
    Critique,
    Generation,
    Limits,
    Problem,
    Rules,
    Sampling,
    Solution,
    StdinTest,
    Summary,
    Verdict,
)

TESTS = (StdinTest(stdin="", expected_stdout="1"), StdinTest(stdin="", expected_stdout="2"))
P, Q = (
    Problem(id=name, source="s", split="test", prompt=f"prompt {name}", tests=TESTS, canonical_solution=f"{name} = 1\n")
    for name in ("p", "q")
)
PROMPTS = Prompts.load("default")
GREEDY = Sampling(temperature=0.0)


class Script:
    """A generator that answers with numbered texts, and remembers what it was asked."""

    def __init__(self, form="```python\nx = {}\n```"):
        self.form, self.chats, self.count = form, [], 0

    def complete(self, chats, sampling):
        self.chats.append(list(chats))
        out = []
        for _ in chats:
            texts = [self.form.format(self.count + j) for j in range(sampling.n)]
            self.count += sampling.n
            out.append([Generation(text=text) for text in texts])
        return out


class Judge:
    """An executor that accepts programs named right, and remembers what it was given."""

    def __init__(self, *right):
        self.right, self.calls = right, []

    def run_many(self, executions):
        self.calls.append(list(executions))
        return [Verdict(status="accepted" if item.program in self.right else "wrong_answer") for item in executions]


def solution(problem, k, program="x", verdict=None):
    return Solution(
        id=f"{problem.id}/{k}", problem_id=problem.id, text=f"text {program}", program=program, verdict=verdict
    )


def said(of, judgement, text="Change it."):
    return Critique(id=f"{of.id}#0", solution_id=of.id, text=text, judgement=judgement)


def test_drafts_are_flat_in_order_and_parsed():
    generator = Script()
    drafts = draft([P, Q], generator, PROMPTS, Sampling(n=2))
    assert [(item.id, item.problem_id, item.program, item.verdict) for item in drafts] == [
        ("p/0", "p", "x = 0", None),
        ("p/1", "p", "x = 1", None),
        ("q/0", "q", "x = 2", None),
        ("q/1", "q", "x = 3", None),
    ]
    assert generator.chats == [[PROMPTS.solution(P), PROMPTS.solution(Q)]]


def test_critiques_are_flat_judged_and_keep_their_generation():
    critic = Script("no. {}\nOverall judgment: Incorrect")
    pairs = [(P, solution(P, 0)), (Q, solution(Q, 1))]
    critiques = critique(pairs, critic, PROMPTS, Sampling(n=2))
    assert [item.id for item in critiques] == ["p/0#0", "p/0#1", "q/1#0", "q/1#1"]
    assert {item.judgement for item in critiques} == {"incorrect"}
    assert critiques[3].generation.text == critiques[3].text == "no. 3\nOverall judgment: Incorrect"
    assert critic.chats == [[PROMPTS.critique(*pair) for pair in pairs]]


def test_hinted_critiques_show_the_hint():
    critic = Script("?")
    critique_with_hints([(P, solution(P, 0), Hint(kind="failed", text="THE HINT"))], critic, PROMPTS, Sampling())
    assert "THE HINT" in critic.chats[0][0][-1].content


def test_a_draft_judged_correct_is_kept_without_asking():
    generator = Script()
    verdict = Verdict(status="accepted")
    first, second = solution(P, 0, verdict=verdict), solution(Q, 0)
    triples = [(P, first, said(first, "correct")), (Q, second, said(second, "incorrect"))]
    kept, revised = revise(triples, generator, PROMPTS, GREEDY)
    assert (kept.kept, kept.text, kept.program, kept.verdict) == (True, "text x", "x", verdict)
    assert (revised.kept, revised.program, revised.verdict) == (False, "x = 0", None)
    assert generator.chats == [[PROMPTS.revision(Q, second, "Change it.")]]


def test_without_the_gate_every_draft_is_revised():
    first = solution(P, 0)
    (revised,) = revise([(P, first, said(first, "correct"))], Script(), PROMPTS, GREEDY, gate=False)
    assert not revised.kept


def test_a_critique_without_a_judgement_is_followed():
    first = solution(P, 0)
    (revised,) = revise([(P, first, said(first, None))], Script(), PROMPTS, GREEDY)
    assert not revised.kept


def test_identical_greedy_chats_are_asked_once_but_samples_each():
    first = solution(P, 0)
    triples = [(P, first, said(first, "incorrect"))] * 3 + [(P, first, said(first, "incorrect", "Else."))]
    generator = Script()
    assert [item.program for item in revise(triples, generator, PROMPTS, GREEDY)] == ["x = 0"] * 3 + ["x = 1"]
    assert [len(chats) for chats in generator.chats] == [2]
    sampled = revise(triples, Script(), PROMPTS, Sampling(temperature=1.0))
    assert [item.program for item in sampled] == ["x = 0", "x = 1", "x = 2", "x = 3"]


class Terse(Script):
    """A critic that never judges of itself."""

    def __init__(self, *texts):
        super().__init__()
        self.texts, self.closed = texts, []

    def complete(self, chats, sampling):
        return [[Generation(text=text)] for text in self.texts]

    def extend(self, chats, begun, text, sampling, choices=()):
        self.closed.append((text, list(chats), tuple(choices)))
        return [replace(item, text=item.text + text + choices[1]) for item in begun]


def test_critiques_without_a_judgement_get_one_of_both_outside_of_their_code():
    prompts = Prompts.load("default", critique_close="Overall judgment:")
    drafts = [solution(P, k) for k in range(3)]
    critic = Terse("It adds.", "It has:\n```python\nx", "Overall judgment: Correct")
    found = critique([(P, item) for item in drafts], critic, prompts, Sampling())
    assert [item.judgement for item in found] == ["incorrect", "incorrect", "correct"]
    assert found[1].text == "It has:\n```python\nx\n```\n\nOverall judgment: Incorrect"
    words = (" Correct", " Incorrect")
    assert critic.closed == [
        ("\n\nOverall judgment:", [prompts.critique(P, drafts[0])], words),
        ("\n```\n\nOverall judgment:", [prompts.critique(P, drafts[1])], words),
    ]


def test_nothing_is_asked_when_all_drafts_are_kept():
    first, generator = solution(P, 0), Script()
    revise([(P, first, said(first, "correct"))], generator, PROMPTS, GREEDY)
    assert generator.chats == []


def test_identical_programs_of_a_problem_are_executed_once():
    judge = Judge("a")
    records = [(P, solution(P, 0, "a")), (P, solution(P, 1, "a")), (Q, solution(Q, 0, "a")), (P, solution(P, 2, "b"))]
    done = execute(records, judge, Rules())
    assert [item.verdict.status for item in done] == ["accepted", "accepted", "accepted", "wrong_answer"]
    assert [[item.program for item in call] for call in judge.calls] == [["a", "a", "b"]]
    assert [item.id for item in done] == ["p/0", "p/1", "q/0", "p/2"]


def test_stopping_at_the_first_failure_and_the_time_budget_reach_the_executor():
    judge, rules = Judge(), Rules(time_budget_s=160.0)
    execute([(P, solution(P, 0))], judge, rules)
    execute([(P, solution(P, 0))], judge, rules, stop_at_first_failure=True)
    asked = [(item.stop_at_first_failure, item.time_budget_s) for call in judge.calls for item in call]
    assert asked == [(False, 160.0), (True, 160.0)]


def test_an_answer_without_a_program_is_wrong_without_execution():
    judge = Judge()
    (done,) = execute([(P, solution(P, 0, None))], judge, Rules())
    summary = Summary(statuses=(("not_run", 2),))
    assert done.verdict == Verdict(status="wrong_answer", detail="no program in the answer", summary=summary)
    assert (done.verdict.passed, done.verdict.total) == (0, 2)
    assert judge.calls == []


def test_a_verdict_at_hand_is_kept():
    judge, verdict = Judge(), Verdict(status="time_limit")
    (done,) = execute([(P, solution(P, 0, verdict=verdict))], judge, Rules())
    assert done.verdict == verdict
    assert judge.calls == []


def test_the_problems_limits_win_and_wall_time_follows_cpu_time():
    rules = Rules(limits=Limits(cpu_s=10.0, wall_s=25.0, memory_mb=512, output_bytes=100, processes=3))
    assert limits(P, rules) == Limits(cpu_s=10.0, wall_s=25.0, memory_mb=512, output_bytes=100, processes=3)
    tight = Problem(id="t", source="s", split="test", prompt="", tests=TESTS, cpu_s=2.0, memory_mb=64)
    assert limits(tight, rules) == Limits(cpu_s=2.0, wall_s=5.0, memory_mb=64, output_bytes=100, processes=3)


def test_the_oracle_answers_every_turn_with_the_canonical_solution():
    oracle = OracleGenerator([P, Q], PROMPTS)
    (drafted,) = draft([Q], oracle, PROMPTS, Sampling())
    assert drafted.program == "q = 1"
    first = solution(P, 0)
    (revised,) = revise([(P, first, said(first, "incorrect"))], oracle, PROMPTS, GREEDY)
    assert revised.program == "p = 1"
    with pytest.raises(ValueError, match="no known problem asks"):
        OracleGenerator([P], PROMPTS).complete([PROMPTS.solution(Q)], GREEDY)


def test_an_oracle_needs_canonical_solutions():
    bare = Problem(id="bare", source="taco", split="test", prompt="", tests=TESTS)
    with pytest.raises(ValueError, match="problem bare of taco has no canonical_solution"):
        OracleGenerator([bare], PROMPTS)


def test_solutions_that_are_skipped_are_not_revised():
    first, second = draft([P], Script(), PROMPTS, Sampling(n=2))
    generator = Script()
    triples = [(P, first, said(first, "incorrect")), (P, second, said(second, "incorrect"))]
    skipped, revised = revise(triples, generator, PROMPTS, GREEDY, skip=frozenset({first.id}))
    assert (skipped.kept, skipped.program) == (True, first.program)
    assert not revised.kept


def test_a_problem_in_cpp_is_asked_for_and_taken_in_cpp():
    problem = replace(P, language="cpp")
    generator = Script("```cpp\nint main() {{}} // {}\n```\nAs in Python:\n```python\nprint(1)\n```")
    (solution,) = draft([problem], generator, PROMPTS, Sampling(n=1))
    asked = generator.chats[0][0][-1].content
    assert "problem below in C++." in asked and "in one ```cpp code block" in asked and "ython" not in asked
    assert solution.program == "int main() {} // 0"
    revised = revise([(problem, solution, said(solution, "incorrect"))], generator, PROMPTS, GREEDY)
    assert revised[0].program == "int main() {} // 1"
    assert "in Python." in Prompts.load("default").solution(P)[-1].content
