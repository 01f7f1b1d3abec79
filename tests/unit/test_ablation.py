"""Which sentence taught: a critique cut into sentences, a fix that hangs on one, and what the report says of it."""

import json

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.data import catalog
from ctrl_hpc.evaluate.ablation import Fix, Sentence, file_of, numbers
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.ablation import ablate, names_failure, sentences, without
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Critique, Problem, Rules, Sampling, Solution, StdinTest, TestResult, Verdict
from ctrl_hpc.report import page, results

CRITIQUE = """\
Analysis: It adds, e.g. 1.5 and 2. It should multiply!
- The name is bad.
1. So is the type; see (below.)  Is it?
```python
x = 1. + 2
```
**Improvement suggestions:** use 7
Overall judgment: Incorrect
"""


def test_the_sentences_of_a_critique():
    found = [CRITIQUE[start:end] for start, end in sentences(CRITIQUE)]
    assert found == [
        "It adds, e.g. 1.5 and 2. ",
        "It should multiply!",
        "- The name is bad.",
        "1. So is the type; see (below.)  ",
        "Is it?",
        "```python\nx = 1. + 2\n```\n",
        "use 7",
    ]
    assert "Analysis: It should" in without(CRITIQUE, sentences(CRITIQUE)[0])
    assert sentences("") == sentences("Overall judgment: Correct") == []
    assert [without("A. B.", span) for span in sentences("A. B.")] == ["B.", "A. "]
    tiny = (
        "Analysis: keep the even ones; ok. cube each; wrong.\nImprovement suggestions: none.\nOverall judgment: Correct"
    )
    assert [tiny[a:b].strip() for a, b in sentences(tiny)] == ["keep the even ones; ok.", "cube each; wrong.", "none."]


def sample(k=3, critique="Analysis: look. Use it. use 3\nIt ends.\nOverall judgment: Incorrect"):
    (problem,) = [item for item in toy_world.problems(k + 1) if item.id == f"toy/{k}"]
    draft = Solution(id=f"toy/{k}/0", problem_id=problem.id, text=toy_world.fenced(k + 1), program=f"print({k + 1})")
    return problem, draft, Critique(id="c", solution_id=draft.id, text=critique, judgement="incorrect")


def test_a_revision_without_each_sentence():
    generator, executor = toy_world.Generator(), toy_world.Executor()
    greedy = Sampling(temperature=0.0)
    found, again = ablate([sample(), sample()], generator, executor, Prompts.load("default"), Rules(), greedy)
    texts = [sample()[2].text[start:end].strip() for start, end in found.spans]
    assert texts == ["look.", "Use it.", "use 3", "It ends."]
    passed = [revision.verdict.accepted for revision in found.revisions]
    assert passed == [True, True, False, True] and again == found
    assert generator.asked == 4 and len(executor.programs) == 2  # equal texts and programs once
    with pytest.raises(AssertionError):
        ablate([sample()], generator, executor, Prompts.load("default"), Rules(), Sampling())


def failing(status, **result):
    problem = Problem(
        id="p", source="s", split="test", prompt="", tests=(StdinTest(stdin="17 4\n", expected_stdout="21\n"),)
    )
    verdict = Verdict(status=status, tests=(TestResult(status=status, **result),))
    return problem, Solution(id="p/0", problem_id="p", text="", program="", verdict=verdict)


@pytest.mark.parametrize(
    ("sentence", "status", "result", "named"),
    [
        ("For 17 4 it prints 13.", "wrong_answer", {"stdout": b"13\n"}, True),
        ("It must print 21.", "wrong_answer", {"stdout": b"13\n"}, True),
        ("There are 213 ways.", "wrong_answer", {"stdout": b"13\n"}, False),
        ("It prints 3 too often.", "wrong_answer", {"stdout": b"3\n"}, False),
        ("It prints `3`.", "wrong_answer", {"stdout": b"3\n"}, True),
        ("This raises an IndexError.", "runtime_error", {"stderr": b"IndexError: list index out of range\n"}, True),
        ("This raises an error.", "runtime_error", {"stderr": b"IndexError: list index out of range\n"}, False),
        ("The loop is quadratic.", "time_limit", {}, True),
        ("The loop is ugly.", "time_limit", {}, False),
        ("It is right.", "accepted", {}, False),
    ],
)
def test_whether_a_sentence_names_the_failure(sentence, status, result, named):
    assert names_failure(sentence, *failing(status, **result)) is named


def test_where_the_data_set_knows_what_is_wrong():
    from ctrl_hpc.tiny import world

    problem = next(item for item in world.load()["test"] if "sum with alternating signs" in item.prompt)
    program = problem.canonical_solution.replace("sum(x[::2]) - sum(x[1::2])", "sum(x)")
    assert program != problem.canonical_solution
    draft = Solution(id="d", problem_id="", text="", program=program)
    critique = world.oracle_critique(problem, draft.program)
    said = [critique[start:end] for start, end in sentences(critique)]
    oracle = catalog.ORACLES["tiny"]
    named = [sentence.strip() for sentence in said if names_failure(sentence, problem, draft, oracle)]
    assert named == ["sum with alternating signs; wrong.", "sum with alternating signs;"]


def test_the_numbers_worked_by_hand():
    def fix(*rows):
        return Fix(sample="s", sentences=tuple(Sentence(text=t, decisive=d, names_failure=n) for t, d, n in rows))

    fixes = [
        fix(("a", True, True), ("b", False, False)),
        fix(("c", True, False), ("d", None, False), ("e", False, True)),
        fix(("f", True, True), ("g", True, True)),
        fix(("h", False, False)),
    ]
    found = numbers(fixes, 2)
    assert (found["n_fixes"], found["sentences"], found["decisive"]) == (4, 2.0, 1.0)
    assert (found["single_decisive"], found["none_decisive"], found["names_failure"]) == (0.5, 0.25, 0.5)
    assert found["all_sentences_name_failure"] == 0.5
    assert [item["decisive"] for item in found["examples"]] == [["a"], ["c"]]
    assert numbers([], 2)["single_decisive"] is None


def test_an_evaluation_that_ablates(tmp_path):
    """The toy critic's advice is a sentence of its own: every fix hangs on it and on nothing else."""
    toy_world.folder(tmp_path / "base", 1.0)
    settings = [f"run_dir={tmp_path / 'run'}", "data.eval_names=[toy]", "eval.critics=[none,base]", "eval.ablate=true"]
    settings += [f"critic.model={tmp_path / 'base'}", "eval.bootstrap=50", "eval.turns=1", "wandb.mode=disabled"]
    config = load(ROOT / "configs" / "tiny.yaml", [*settings, "eval.greedy=false", "prompts.folder=default"])
    problems = toy_world.problems(12)
    jsonl.write(tmp_path / "run" / "problems" / "eval-toy.jsonl", problems)
    for _ in range(2):
        connections = toy_world.Connections()
        run(config, tmp_path / "run", connections, {"toy": problems}, Prompts.load("default"))
    assert connections.generator.asked == 0  # the second time all is on disk
    fixes = jsonl.read(Fix, file_of(tmp_path / "run" / "eval" / "toy" / "base"))
    assert [[item.text for item in fix.sentences if item.decisive] for fix in fixes] == [
        [f"use {int(fix.sample.split('/')[1])}"] for fix in fixes
    ]
    histories = {"toy": results.read_histories(config, tmp_path / "run", "toy")}
    found = results.collect(config, tmp_path / "run", histories)["datasets"]["toy"]["critics"]["base"]["ablation"]
    assert found["n_fixes"] == len(fixes) >= 4 and found["single_decisive"] == 1.0
    page.write(config, tmp_path / "run")
    told = (tmp_path / "run" / "report" / "results.md").read_text()
    assert "toy: sentences on which a fix hangs" in told and "use 0" in told
    assert json.loads((tmp_path / "run" / "report" / "results.json").read_text())
