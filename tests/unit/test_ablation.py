"""Which sentence taught: a critique cut into sentences, a fix that hangs on one, and what the report says of it."""

import json
import re
from dataclasses import replace

import pytest
import torch
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, Config, RLConfig, load
from ctrl_hpc.data import catalog
from ctrl_hpc.evaluate.ablation import Fix, Sentence, file_of, numbers
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.ablation import ablate, names_failure, sentences, without
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Critique, Generation, Problem, Rules, Sampling, Solution, StdinTest, TestResult, Verdict
from ctrl_hpc.report import page, results
from ctrl_hpc.train.advantages import estimate
from ctrl_hpc.train.collect import Collector, collect, roll_out
from ctrl_hpc.train.credit import tokens_of
from ctrl_hpc.train.drafts import DraftPool
from ctrl_hpc.train.loop import Clock
from ctrl_hpc.train.rewards import Rewards
from ctrl_hpc.train.rollouts import Experience, Rollout, learnable_groups

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


class Tokens:
    """A critic whose tokens are words with the blank before them."""

    def __init__(self, critiques):
        self.critiques, self.words = critiques, ["", "é", "\ufffd"]

    def ids(self, text):
        pieces = re.findall(r"\s*\S+", text)
        self.words += [piece for piece in pieces if piece not in self.words]
        return tuple(self.words.index(piece) for piece in pieces)

    def spell(self, ids):
        return "".join(self.words[token] for token in ids)

    def update_weights(self, place, version):
        return 1

    def complete(self, chats, sampling):
        made = [
            Generation(text=text, prompt_ids=(0,), token_ids=self.ids(text), logprobs=(-1.0,) * len(self.ids(text)))
            for text in self.critiques
        ]
        return [made for _ in chats]


ADVICE = "Analysis: look. Use it. use 3\nOverall judgment: Incorrect"


def test_a_sentences_tokens():
    critic = Tokens([])
    critique = Critique(id="c", solution_id="s", text=ADVICE, judgement=None, generation=None)
    assert tokens_of(critique, sentences(ADVICE), "", critic.spell) == [(0, 0)] * 3
    generation = Generation(text=ADVICE, token_ids=critic.ids(ADVICE))
    made = replace(critique, generation=generation)
    assert tokens_of(made, sentences(ADVICE), "", critic.spell) == [(1, 2), (2, 4), (4, 6)]
    # the critique's text begins with what the prompt put there, and a thought was cut off before it
    begun = replace(made, generation=Generation(text=ADVICE[10:], token_ids=critic.ids(ADVICE[10:])))
    assert tokens_of(begun, sentences(ADVICE), ADVICE[:10], critic.spell)[1] == (1, 3)
    thought = Generation(text=ADVICE, token_ids=critic.ids("so so " + ADVICE), thought="so so", thought_tokens=2)
    assert tokens_of(replace(made, generation=thought), sentences(ADVICE), "", critic.spell)[0] == (3, 4)
    assert tokens_of(replace(made, text="other"), [(0, 5)], "", critic.spell) == [(0, 0)]


def test_credit_goes_to_the_tokens_of_the_decisive_sentence(tmp_path):
    """Two critiques of one wrong draft: one fixes it by its third sentence, the other has nothing to lose."""
    critic = Tokens([ADVICE, "Analysis: look.\nOverall judgment: Incorrect"])
    problem, draft, _ = sample()
    draft = replace(draft, verdict=Verdict(status="wrong_answer"))
    services = toy_world.Connections()
    services.critic = critic
    options = RLConfig(credit="sentence", group_size=2, prompts_per_step=1, minibatches=1)
    made = Collector(
        config=Config(name="credit", rl=options),
        stage=tmp_path,
        prompts=Prompts.load("default"),
        connections=services,
        spell=critic.spell,
    )
    (fix, miss), _ = roll_out(made, [(problem, draft)], Rewards.at(options, 0), 1, Clock())
    assert (fix.reward, miss.reward) == (1.0, 0.0)
    assert fix.credit == ((1, 2, 0.0), (2, 4, 0.0), (4, 6, 1.0)) and miss.credit == ((1, 2, 0.0),)
    experience = Experience.of([fix, miss], version=0, position=0, metrics={})
    found = estimate(experience, None, options, backend="torch").advantages_SR
    # GRPO: (1 - 1/2) / 0.7071; 9 tokens of which two have the credit 1, so 2/9 on average
    base = 0.5 / (0.5**0.5 + 1e-6)
    expected = [base - 2 / 9] * 4 + [base + 7 / 9] * 2 + [base - 2 / 9] * 3
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert found[1, :5].tolist() == pytest.approx([-base] * 5, abs=1e-5)
    assert found[0].sum().item() == pytest.approx(9 * base, abs=1e-4)  # moved, not made
    # where all earned the same the sentences still differ, and are learnt from
    equal = [fix, replace(miss, reward=1.0)]
    assert Experience.of(equal, version=0, position=0, metrics={}).learnable_groups() == [0]
    assert learnable_groups(equal) == [fix.solution_id]
    plain = [replace(item, credit=()) for item in equal]
    assert Experience.of(plain, version=0, position=0, metrics={}).learnable_groups() == learnable_groups(plain) == []
    whole = estimate(experience, None, replace(options, credit="critique"), backend="torch").advantages_SR
    assert whole[0].tolist() == pytest.approx([base] * 9, abs=1e-5)
    assert experience.metrics["rl/credited_sentences"] == 2.0 and experience.metrics["rl/single_decisive"] == 0.5
    again = Experience.of(
        [jsonl.decode(Rollout, jsonl.encode(item)) for item in (fix, miss)], version=0, position=0, metrics={}
    )
    assert torch.equal(again.credit_SR, experience.credit_SR)  # recorded, and so replayed


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["rl.max_tokens=768", "rl.prompts_per_step=128"],
            "about 32768 revisions and executions a step (128 drafts x 8 critiques x 32 sentences), 32 times as many",
        ),
        (["rl.turns=2"], "rl.credit: sentence goes with rl.turns=1, not 2"),
        (["rl.estimator=gae"], "rl.credit: sentence goes with rl.estimator=grpo, dr_grpo or rloo, not gae"),
    ],
)
def test_credit_that_is_too_dear_or_has_no_meaning_is_refused(overrides, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        load(ROOT / "configs" / "tiny.yaml", ["rl.credit=sentence", *overrides])
    assert load(ROOT / "configs" / "tiny.yaml", ["rl.credit=sentence"]).rl.credit == "sentence"


def test_a_reward_of_ones_own_that_fails_for_all_of_a_step_ends_it(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(problem, draft, critique, revision): return 1 / 0\n")
    critic = Tokens([ADVICE, ADVICE])
    critic.update_weights = lambda folder, version: None
    services = toy_world.Connections()
    services.critic = critic
    problem, draft, _ = sample()
    draft = replace(draft, verdict=Verdict(status="wrong_answer"))
    options = RLConfig(reward=f"{tmp_path}/mine.py:f", group_size=2, prompts_per_step=1, minibatches=1)
    made = Collector(
        config=Config(name="own", rl=options),
        stage=tmp_path,
        prompts=Prompts.load("default"),
        connections=services,
        pool=DraftPool(pairs=((problem, draft),), seed=0),
    )
    with pytest.raises(ValueError, match=r"rl\.reward: .*mine\.py:f failed for all 2 critiques of step 0, see above"):
        collect(made, 0, 0, 0)
    assert "ZeroDivisionError: division by zero; 2 of 2 critiques are left out" in capsys.readouterr().out
