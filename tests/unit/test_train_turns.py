"""Episodes of several turns in RL: who is asked what, what each turn is worth, and that one turn is what it was."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config, RLConfig
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.reward import score
from ctrl_hpc.flow.steps import critique, execute, revise
from ctrl_hpc.records import Generation, Problem, Sampling, Solution, Verdict
from ctrl_hpc.seeds import derive_seed
from ctrl_hpc.train.collect import Collector, roll_out
from ctrl_hpc.train.loop import Clock
from ctrl_hpc.train.rewards import Rewards, returns
from ctrl_hpc.train.rollouts import Experience, Rollout, learnable_groups, replay, summary

SEED = 11


class Critic:
    """Draws by the number that a chat has in its call, as servers do; names the right program four times in ten."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def complete(self, chats: Any, sampling: Sampling) -> list[list[Generation]]:
        self.asked.append(len(chats))
        return [
            [
                self._one(chat[0].content, derive_seed(sampling.seed or 0, sampling.number(i), j))
                for j in range(sampling.n)
            ]
            for i, chat in enumerate(chats)
        ]

    def _one(self, text: str, seed: int) -> Generation:
        k, said = int(re.search(r"say (\d+)", text)[1]), int(re.search(r"print\((\d+)\)", text)[1])  # type: ignore[index]
        able = random.Random(seed).random() < 0.4
        judgement = "Correct" if k == said else "Incorrect"
        ids = (seed % 97, 2, 3)
        return Generation(
            text=f"use {k if able else k + 50}\nOverall judgment: {judgement}",
            prompt_ids=(1, said),
            token_ids=ids,
            logprobs=(-1.0, -0.5, -0.25),
        )


def collector(tmp_path: Path, **keys: Any) -> tuple[Collector, list[tuple[Problem, Solution]], Critic]:
    """And four drafts, the last one right."""
    options = RLConfig(prompts_per_step=4, group_size=3, **keys)
    services: Any = toy_world.Connections()
    services.critic = critic = Critic()
    pairs = []
    for problem in toy_world.problems(4):
        k = int(problem.id.split("/")[1])
        said = k if k == 3 else k + 100
        verdict = Verdict(status="accepted" if said == k else "wrong_answer")
        text = toy_world.fenced(said)
        pairs.append(
            (
                problem,
                Solution(
                    id=f"{problem.id}/0", problem_id=problem.id, text=text, program=f"print({said})", verdict=verdict
                ),
            )
        )
    made = Collector(
        config=Config(name="turns", rl=options), stage=tmp_path, prompts=Prompts.load("default"), connections=services
    )
    return made, pairs, critic


def rolled_out(tmp_path: Path, **keys: Any) -> list[Rollout]:
    made, pairs, _ = collector(tmp_path, **keys)
    return roll_out(made, pairs, Rewards.at(made.config.rl, 0), SEED, Clock())[0]


def test_recorded_rollouts_are_shown_and_replayed_compressed_or_not(tmp_path: Path) -> None:
    made, _, _ = collector(tmp_path)
    rollouts = rolled_out(tmp_path)
    for step, ending in enumerate(("jsonl.gz", "jsonl")):
        jsonl.write(tmp_path / "rollouts" / f"step-{step:06d}.{ending}", rollouts)
        assert replay(tmp_path / "rollouts", step) == rollouts
        shown = made.samples(step, 2)
        assert [row[:2] for row in shown] == [[step, item.solution_id] for item in rollouts[:2]]
    assert made.samples(2, 2) == []
    with pytest.raises(ValueError, match=r"rl\.replay: .*step-000002\.jsonl\.gz does not exist"):
        replay(tmp_path / "rollouts", 2)


def test_one_turn_is_the_method_step_by_step(tmp_path: Path) -> None:
    """The calls of the single-turn loop, written out."""
    made, pairs, critic = collector(tmp_path)
    config, services, prompts = made.config, made.connections, made.prompts
    assert services is not None
    sampling = Sampling(temperature=1.0, max_tokens=768, n=3, seed=SEED)
    critiques = critique(pairs, critic, prompts, sampling)
    repeated = [pair for pair in pairs for _ in range(3)]
    triples = [(problem, draft, item) for (problem, draft), item in zip(repeated, critiques, strict=True)]
    revisions = revise(triples, services.generator, prompts, Sampling(temperature=0.0, max_tokens=1024))
    todo = [(problem, item) for (problem, _), item in zip(repeated, revisions, strict=True)]
    revisions = execute(todo, services.executor, config.executor.rules, stop_at_first_failure=True)
    expected = [
        Rollout.of(item, revision, draft, score(item, revision, draft.verdict))  # type: ignore[arg-type]
        for (_, draft, item), revision in zip(triples, revisions, strict=True)
    ]
    for kind in ("last", "each", "gain"):
        assert rolled_out(tmp_path, turn_reward=kind, turn_discount=0.3) == expected


def test_a_revision_is_the_next_turns_draft_until_one_is_judged_correct(tmp_path: Path) -> None:
    rollouts = rolled_out(tmp_path, turns=3)
    first = [item for item in rollouts if item.turn == 1]
    assert [replace(item, reward=0.0) for item in first] == [
        replace(item, reward=0.0) for item in rolled_out(tmp_path)
    ]  # the same critiques as in a run of one turn
    assert {item.solution_id for item in rollouts} == {f"toy/{k}/0" for k in range(4)}
    right = [item for item in rollouts if item.solution_id == "toy/3/0"]
    assert [(item.turn, item.kept, item.reward) for item in right] == [(1, True, 1.0)] * 3
    for turn in (1, 2):
        now, after = ([item for item in rollouts if item.turn == t] for t in (turn, turn + 1))
        assert len(after) == sum(not item.kept for item in now) > 0
        drafts = sorted(re.search(r"print\(\d+\)", item.revision)[0] for item in now if not item.kept)  # type: ignore[index]
        assert sorted(str(item.draft) for item in after) == drafts
    kept = [item for item in rollouts if item.kept]
    assert {item.turn for item in kept} == {1, 2, 3} and all(item.draft_accepted for item in kept)
    metrics = summary(rollouts, 0)
    assert metrics["rl/turns"] == len(rollouts) / 12
    assert metrics["rl/turn_2/pass_rate"] == sum(i.status == "accepted" for i in rollouts if i.turn == 2) / sum(
        i.turn == 2 for i in rollouts
    )
    assert "rl/turns" not in summary(first, 0)


def test_the_division_into_chunks_changes_nothing(tmp_path: Path) -> None:
    whole = rolled_out(tmp_path, turns=3)
    assert whole == rolled_out(tmp_path, turns=3, chunk=1) == rolled_out(tmp_path, turns=3, chunk=3)


def test_critiques_are_compared_with_those_of_the_same_draft_and_turn(tmp_path: Path) -> None:
    rollouts = rolled_out(tmp_path, turns=3)
    experience = Experience.of(rollouts, version=0, position=0, metrics={})
    keys = [(item.solution_id, item.turn) for item in rollouts]
    assert len(set(keys)) == experience.n_groups
    for a, b in ((a, b) for a in range(len(keys)) for b in range(len(keys))):
        assert (keys[a] == keys[b]) == (experience.groups_S[a] == experience.groups_S[b])
    advantages = experience.advantages("dr_grpo").tolist()
    for key in set(keys):
        mine = [row for row in range(len(keys)) if keys[row] == key]
        mean = sum(rollouts[row].reward for row in mine) / len(mine)
        for row in mine:
            assert advantages[row] == pytest.approx(rollouts[row].reward - mean, abs=1e-6)
    assert set(learnable_groups(rollouts)) == {
        solution
        for solution, _ in set(keys)
        if any(len({i.reward for i in rollouts if (i.solution_id, i.turn) == (solution, t)}) > 1 for t in (1, 2, 3))
    }


@pytest.mark.parametrize(
    ("kind", "discount", "values", "expected"),
    [
        ("last", 1.0, [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
        ("last", 0.5, [0.0, 1.0, 1.0], [0.25, 0.5, 1.0]),
        ("each", 1.0, [0.0, 0.0, 1.0], [1 / 3, 1 / 2, 1.0]),
        ("each", 0.5, [0.0, 1.0, 0.0], [0.5 / 1.75, 1 / 1.5, 0.0]),
        ("each", 1.0, [0.0, 1.0], [2 / 3, 1.0]),  # it stopped: the third turn would be as the second
        ("each", 1.0, [1.0], [1.0]),
        ("each", 0.0, [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        ("gain", 1.0, [0.25, 0.0, 1.0], [1.0, 0.75, 1.0]),
        ("gain", 0.5, [0.25, 0.0, 1.0], [0.25 - 0.125 + 0.25, -0.25 + 0.5, 1.0]),
        ("gain", 0.0, [0.25, 0.0, 1.0], [0.25, -0.25, 1.0]),
    ],
)
def test_what_a_turn_is_worth_by_hand(kind: Any, discount: float, values: list[float], expected: list[float]) -> None:
    options = RLConfig(turns=3, turn_reward=kind, turn_discount=discount)
    assert returns(values, options) == pytest.approx(expected)


def test_where_the_environment_fails_no_turn_of_the_episode_counts(tmp_path: Path) -> None:
    made, pairs, _ = collector(tmp_path, turns=3)

    class Failing(toy_world.Executor):
        def run_many(self, executions: Any) -> list[Verdict]:
            fault = Verdict(status="sandbox_error", detail="gone")
            return [
                fault if item.program == "print(50)" else verdict
                for item, verdict in zip(executions, super().run_many(executions), strict=True)
            ]

    made.connections.executor = Failing()  # type: ignore[union-attr, misc, assignment]
    rollouts, _ = roll_out(made, pairs, Rewards.at(made.config.rl, 0), SEED, Clock())
    failed = [item for item in rollouts if item.status == "sandbox_error"]
    assert failed and all(item.masked for item in failed)
    last = {item.solution_id: item.turn for item in failed}
    assert set(last) == {"toy/0/0"}
    mine = [item for item in rollouts if item.solution_id == "toy/0/0"]
    assert sum(item.masked for item in mine if item.turn == 1) == len(failed)


def test_an_episode_ends_where_a_revision_leaves_no_room(tmp_path: Path) -> None:
    made, pairs, critic = collector(tmp_path, turns=3)
    rollouts, _ = roll_out(
        replace(made, fits=lambda problem, draft: False), pairs, Rewards.at(made.config.rl, 0), SEED, Clock()
    )
    assert {item.turn for item in rollouts} == {1} and len(critic.asked) == 1
