"""Quick evaluations while RL runs, and the table of samples, by hand-worked values."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Generation, Revision, Solution, Verdict
from ctrl_hpc.train import rollouts
from ctrl_hpc.train.rollouts import Rollout
from ctrl_hpc.train.validation import METRIC, Validation, pass_rate, problems_of


class Generator:
    """Drafts are wrong for every third K; a revision prints the number that the critique names."""

    def __init__(self):
        self.drafts, self.revisions = [], 0

    def complete(self, chats, sampling):
        out = []
        for chat in chats:
            k = int(re.search(r"say (\d+)", chat[0].content)[1])
            if len(chat) == 1:
                self.drafts.append(k)
                out.append([Generation(text=toy_world.fenced(k + (k % 3 == 0)))])
            else:
                assert sampling.temperature == 0.0
                self.revisions += 1
                out.append([Generation(text=toy_world.fenced(int(re.search(r"use (\d+)", chat[2].content)[1])))])
        return out


class Critic:
    """Judges every draft for an even K right, and names ``answer(K)`` for an odd one."""

    def __init__(self):
        self.seeds, self.answer = [], lambda k: k

    def complete(self, chats, sampling):
        self.seeds.append(sampling.seed)
        ks = [int(re.search(r"say (\d+)", chat[0].content)[1]) for chat in chats]
        return [[Generation(text=self.text(k))] for k in ks]

    def text(self, k):
        judgement = "Incorrect" if k % 2 else "Correct"
        return f"Analysis: ...\nImprovement suggestions: use {self.answer(k)}\nOverall judgment: {judgement}"


@pytest.fixture
def config(tmp_path):
    options = ["rl.eval_every=4", "rl.eval_problems=6", "data.eval_names=[tiny,humaneval]"]
    return load(ROOT / "configs" / "tiny.yaml", [f"run_dir={tmp_path}", *options])


@pytest.fixture
def services():
    return SimpleNamespace(generator=Generator(), critic=Critic(), executor=toy_world.Executor())


def validation(config, folder, services):
    return Validation(
        config=config,
        folder=folder,
        connections=services,
        prompts=Prompts.load("default"),
        problems={"tiny": toy_world.problems(6), "humaneval": toy_world.problems(2)},
    )


def test_pass_at_1_is_the_mean_over_the_data_sets_of_what_passes_after_one_turn(config, services, tmp_path):
    # tiny: 0 is kept though wrong; 2 and 4 are kept, and right; 1, 3 and 5 are revised, 3 from a wrong draft: 5 of 6.
    # humaneval: 0 is kept though wrong, 1 is revised: 1 of 2.
    assert validation(config, tmp_path, services).metrics() == {METRIC: pytest.approx((5 / 6 + 1 / 2) / 2)}
    assert services.generator.revisions == 4


def test_drafts_are_made_once_in_a_run_and_seeds_are_the_same_at_every_step(config, services, tmp_path):
    first = validation(config, tmp_path, services)
    before = first.metrics()
    assert services.generator.drafts == [0, 1, 2, 3, 4, 5, 0, 1]
    services.critic.answer = lambda k: k + 1  # weights that name the wrong number: only what is kept right passes
    again = validation(config, tmp_path, services)  # the trainer was started again
    assert again.metrics() == {METRIC: pytest.approx((2 / 6 + 0 / 2) / 2)} != before
    assert len(services.generator.drafts) == 8
    assert [item.problem_id for item in jsonl.read(Solution, tmp_path / "humaneval.jsonl")] == ["toy/0", "toy/1"]
    tiny, humaneval, *later = services.critic.seeds
    assert later == [tiny, humaneval] and tiny != humaneval


def test_what_the_sandbox_failed_to_run_is_left_out(config, services, tmp_path):
    services.critic.answer = lambda k: 666
    # of tiny 0, 2 and 4 are left, 2 of them right; of humaneval 0, which is wrong
    assert validation(config, tmp_path, services).metrics() == {METRIC: pytest.approx((2 / 3 + 0 / 1) / 2)}
    revision = Revision(critique_id="c", text="", program=None, kept=False)
    broken = replace(revision, verdict=Verdict(status="sandbox_error"))
    assert pass_rate([broken, revision]) is None
    assert pass_rate([broken, replace(revision, verdict=Verdict(status="accepted"))]) == 1.0


def test_an_evaluation_is_due_after_every_so_many_updates(config, services, tmp_path):
    this = validation(config, tmp_path, services)
    assert [step for step in range(13) if this.due(step)] == [4, 8, 12]


def test_the_problems_are_the_first_of_each_evaluation_set(config, tmp_path):
    for name, count in (("tiny", 9), ("humaneval", 2)):
        jsonl.write(tmp_path / "problems" / f"eval-{name}.jsonl", toy_world.problems(count))
    found = problems_of(config, tmp_path)
    assert {name: [item.id for item in items] for name, items in found.items()} == {
        "tiny": [f"toy/{k}" for k in range(6)],
        "humaneval": ["toy/0", "toy/1"],
    }
    assert problems_of(replace(config, rl=replace(config.rl, eval_every=0)), tmp_path) == {}


def rollout(solution_id, **changes):
    made = Rollout(
        solution_id=solution_id,
        critique="use 4",
        judgement="incorrect",
        draft_accepted=False,
        revision=toy_world.fenced(4),
        kept=False,
        status="accepted",
        reward=1.0,
        reason="passed",
        masked=False,
        prompt_ids=(1,),
        token_ids=(2,),
        logprobs=(-0.5,),
        finish_reason="stop",
        version=3,
    )
    return replace(made, **changes)


def test_rows_show_a_sample_from_the_problem_to_the_reward():
    (problem,) = toy_world.problems(5)[4:]
    wrong = Verdict(status="wrong_answer", detail="test 1 of 1")
    draft = Solution(id="a", problem_id=problem.id, text=toy_world.fenced(5), program="print(5)", verdict=wrong)
    prose = replace(draft, id="b", text="no program", program=None, verdict=None)
    drafts = {"a": (problem, draft), "b": (problem, prose)}
    kept = {"judgement": "correct", "kept": True, "reward": 0.0, "reason": "kept_failed", "status": "wrong_answer"}
    made = [rollout("a"), rollout("b", draft_accepted=True), rollout("gone", detail="test 1 of 1", **kept)]
    text = toy_world.fenced(4)
    after = ["use 4", "incorrect", text, False, "accepted", "", 1.0, "passed", 3]
    lost = ["use 4", "correct", text, True, "wrong_answer", "test 1 of 1", 0.0, "kept_failed", 3]
    assert rollouts.rows(7, made, drafts) == [
        [7, "a", "say 4", "print(5)", "wrong_answer: test 1 of 1", *after],
        [7, "b", "say 4", "no program", "accepted", *after],
        [7, "gone", None, None, "not accepted", *lost],
    ]
    assert [len(rollouts.COLUMNS)] * 3 == [len(row) for row in rollouts.rows(7, made, drafts)]
