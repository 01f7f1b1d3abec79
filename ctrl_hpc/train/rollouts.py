"""Rollouts of a step: recorded, read back, batched, and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ctrl_kernels
import torch
from ctrl_kernels import Backend
from pydantic import Field
from torch import Tensor

from ctrl_hpc import jsonl
from ctrl_hpc.flow.reward import agrees
from ctrl_hpc.records import SAID, Critique, Judgement, Problem, Revision, Reward, Solution
from ctrl_hpc.train.batch import Batch, collate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One critique, what came of it and what it earned: a line of ``rl/rollouts/step-NNNNNN.jsonl.gz``."""

    solution_id: str
    critique: str
    judgement: Judgement | None
    draft_accepted: bool
    revision: str
    kept: bool
    status: str
    reward: float
    reason: str
    masked: bool
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """In as many digits as single precision has."""
    finish_reason: str
    version: int
    leaked: bool = False
    detail: str = ""
    """One line on what went wrong in the revision."""
    forced: tuple[int, int] | None = None
    """Which of ``token_ids`` the critic did not write (``prompts.critique_close``): start and end."""
    turn: Annotated[int, Field(exclude_if=lambda turn: turn == 1)] = 1
    """Of its episode, which began with the draft ``solution_id``."""
    draft: str | None = None
    """The program critiqued, where that was a revision."""
    credit: Annotated[tuple[tuple[int, int, float], ...], SAID] = ()
    """Tokens [start, end) of each sentence, and what it added to the reward (``rl.credit=sentence``)."""
    thought: str | None = None
    """What the critic thought before it wrote the critique."""
    thought_tokens: Annotated[int, SAID] = 0
    """How many of ``token_ids`` are the thought's."""
    thought_cut: Annotated[bool, SAID] = False
    """Whether it has no end, so that there is no critique."""

    @classmethod
    def of(
        cls,
        critique: Critique,
        revision: Revision,
        draft: Solution,
        reward: Reward,
        *,
        turn: int = 1,
        begun: str | None = None,
        credit: tuple[tuple[int, int, float], ...] = (),
    ) -> Rollout:
        """The parts of a finished sample that training and people need; ``begun``: the first draft of its episode.

        Raises ValueError when the critic's server gave no token ids or log-probabilities.
        """
        generation = critique.generation
        if generation is None or not generation.token_ids or len(generation.logprobs) != len(generation.token_ids):
            raise ValueError(f"critique {critique.id}: the critic's server gave no token ids with log-probabilities")
        assert revision.verdict is not None and draft.verdict is not None
        return cls(
            solution_id=begun or critique.solution_id,
            critique=critique.text,
            judgement=critique.judgement,
            draft_accepted=draft.verdict.accepted,
            revision=revision.text,
            kept=revision.kept,
            status=revision.verdict.status,
            reward=reward.value,
            reason=reward.reason,
            masked=reward.masked,
            prompt_ids=generation.prompt_ids,
            token_ids=generation.token_ids,
            logprobs=tuple(map(single_precision, generation.logprobs)),
            finish_reason=generation.finish_reason,
            version=generation.version,
            leaked=reward.leaked,
            detail=revision.verdict.detail,
            forced=generation.forced,
            thought=generation.thought,
            thought_tokens=generation.thought_tokens,
            thought_cut=generation.thought_cut,
            turn=turn,
            draft=(draft.program or draft.text) if turn > 1 else None,
            credit=credit,
        )


def single_precision(value: float) -> float:
    """A number in nine digits, which are enough for the same number in single precision."""
    return float(f"{value:.9g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The rollouts of a step as tensors; the same on every rank."""

    batch: Batch
    rewards_S: Tensor
    groups_S: Tensor
    """Number of the draft that a critique's episode began with, and turn: what it is compared with; int64."""
    valid_S: Tensor
    """False where the environment failed: the critique leaves its group."""
    rollout_SR: Tensor
    """Log-probabilities by the engine that sampled; NaN where it drew among few words alone, which tells no drift."""
    position: int
    """Drafts drawn from the pool so far."""
    metrics: dict[str, float]
    credit_SR: Tensor | None = None
    """What a token's sentence added to the reward, less the mean over the critique's tokens; None: nobody asked."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], *, version: int, position: int, metrics: dict[str, float]) -> Experience:
        """From the rollouts of a step that updates version ``version`` of the weights; adds to ``metrics``."""
        batch = collate([(item.prompt_ids, item.token_ids) for item in rollouts], [item.forced for item in rollouts])
        rollout_SR = torch.zeros(batch.mask_SR.shape)
        for row, item in enumerate(rollouts):
            rollout_SR[row, : len(item.logprobs)] = torch.tensor(item.logprobs)
            if item.forced is not None and not _ends_thought(item):
                rollout_SR[row, item.forced[1] : len(item.logprobs)] = torch.nan
        numbers = {key: number for number, key in enumerate(dict.fromkeys(map(_group, rollouts)))}
        return cls(
            batch=batch,
            rewards_S=torch.tensor([item.reward for item in rollouts]),
            groups_S=torch.tensor([numbers[_group(item)] for item in rollouts]),
            valid_S=torch.tensor([not item.masked for item in rollouts]),
            rollout_SR=rollout_SR,
            position=position,
            metrics=summary(rollouts, version) | metrics,
            credit_SR=_credit(rollouts, batch.mask_SR),
        )

    def advantages(self, estimator: str, *, device: torch.device | str = "cpu", backend: Backend = "auto") -> Tensor:
        """Group-normalised advantages, fp32 [S] on the CPU; zero for critiques that left their group.

        ``device`` and ``backend``: where and how the kernel computes them.
        """
        advantages_S = torch.zeros(len(self.rewards_S))
        valid = self.valid_S.nonzero()[:, 0]
        if len(valid):
            found = ctrl_kernels.group_advantages(
                self.rewards_S[valid].to(device),
                self.groups_S[valid].to(device),
                estimator=estimator,  # type: ignore[arg-type]
                backend=backend,
            )
            advantages_S[valid] = found.cpu()
        return advantages_S

    @property
    def n_groups(self) -> int:
        """Drafts critiqued."""
        return int(self.groups_S.max()) + 1

    def learnable_groups(self) -> list[int]:
        """The groups whose valid rewards are not all the same, or whose sentences are not all worth the same: the
        others have no advantage to learn from."""
        members = [(self.groups_S == group) & self.valid_S for group in range(self.n_groups)]
        credited = [self.credit_SR is not None and bool(self.credit_SR[rows].any()) for rows in members]
        return [
            group for group, rows in enumerate(members) if credited[group] or _has_spread(self.rewards_S[rows].tolist())
        ]

    def valid_groups(self) -> list[int]:
        """The groups that the environment left a critique of."""
        return sorted(set(self.groups_S[self.valid_S].tolist()))

    def rows(self, groups: Sequence[int]) -> list[int]:
        """The valid critiques of some groups."""
        wanted = torch.isin(self.groups_S, torch.tensor(groups, dtype=torch.int64)) & self.valid_S
        return wanted.nonzero()[:, 0].tolist()


def _group(item: Rollout) -> tuple[str, int]:
    return item.solution_id, item.turn


def _credit(rollouts: Sequence[Rollout], mask_SR: Tensor) -> Tensor | None:
    """The tokens' credits; their mean over a critique is 0, so that they only shift its advantage among its tokens."""
    if not any(item.credit for item in rollouts):
        return None
    credit_SR = torch.zeros(mask_SR.shape)
    for row, item in enumerate(rollouts):
        for start, end, value in item.credit:
            credit_SR[row, start:end] = value
    credit_SR = credit_SR * mask_SR
    mean_S = credit_SR.sum(1) / mask_SR.sum(1).clamp_min(1)
    return (credit_SR - mean_S[:, None]) * mask_SR


def _has_spread(rewards: Sequence[float]) -> bool:
    """Whether rewards differ."""
    return len(rewards) > 1 and max(rewards) > min(rewards)


def learnable_groups(rollouts: Sequence[Rollout]) -> list[str]:
    """The drafts whose critiques, or their sentences, did not all earn the same, in one turn at least."""
    rewards: dict[tuple[str, int], list[float]] = {}
    credited = set()
    for item in rollouts:
        if not item.masked:
            rewards.setdefault(_group(item), []).append(item.reward)
            if any(value for *_, value in item.credit):
                credited.add(_group(item))
    return list(
        dict.fromkeys(group[0] for group, values in rewards.items() if group in credited or _has_spread(values))
    )


def summary(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """What a step's rollouts look like, as metrics; means over the critiques that count."""
    counted = [item for item in rollouts if not item.masked]
    n = max(1, len(counted))
    right = sum(agrees(item.judgement, item.draft_accepted) for item in counted)
    staleness = [version - item.version for item in rollouts]
    reasons = {f"rl/reason/{reason}": 0 for reason in sorted({item.reason for item in rollouts})}
    for item in rollouts:
        reasons[f"rl/reason/{item.reason}"] += 1
    revised = [item for item in counted if item.reason not in ("verdict_right", "verdict_wrong")]
    return {
        "rl/reward": sum(item.reward for item in counted) / n,
        "rl/pass_rate": sum(item.status == "accepted" for item in revised) / max(1, len(revised)),
        "rl/leaked": sum(item.leaked for item in counted) / n,
        "rl/draft_pass_rate": sum(item.draft_accepted for item in counted) / n,
        "rl/judgement_accuracy": right / n,
        "rl/judged_correct": sum(item.judgement == "correct" for item in counted) / n,
        "rl/critique_tokens": sum(len(item.token_ids) for item in rollouts) / len(rollouts),
        "rl/truncated": sum(item.finish_reason == "length" for item in rollouts) / len(rollouts),
        "rl/masked": float(len(rollouts) - len(counted)),
        "rl/staleness": float(max(staleness)),
        "rl/staleness_mean": sum(staleness) / len(staleness),
        **_credit_metrics(counted),
        **{name: count / len(rollouts) for name, count in reasons.items()},
        **_of_thoughts(rollouts),
        **_by_turn(rollouts),
    }


def _ends_thought(item: Rollout) -> bool:
    """Whether what is forced ends its thought, which is told from ``prompts.critique_close`` by its place."""
    return item.forced is not None and item.forced[0] < item.thought_tokens


def _of_thoughts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths of thoughts and answers in tokens, the shares of thoughts cut off and ended by force; none without."""
    if all(item.thought is None for item in rollouts):
        return {}
    n = len(rollouts)
    forced = sum(map(_ends_thought, rollouts))
    return {
        "rl/thought_tokens": sum(item.thought_tokens for item in rollouts) / n,
        "rl/answer_tokens": sum(len(item.token_ids) - item.thought_tokens for item in rollouts) / n,
        "rl/thought_cut": sum(item.thought_cut for item in rollouts) / n,
        "rl/thought_closed": forced / n,
    }


def _by_turn(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Turns an episode, and the share of each turn's revisions that pass; nothing where all have one turn."""
    most, begun = max(item.turn for item in rollouts), sum(item.turn == 1 for item in rollouts)
    if most == 1:
        return {}
    out = {"rl/turns": len(rollouts) / begun}
    for turn in range(1, most + 1):
        passed = [item.status == "accepted" for item in rollouts if item.turn == turn and not item.masked]
        out[f"rl/turn_{turn}/pass_rate"] = sum(passed) / max(1, len(passed))
    return out


def _credit_metrics(counted: Sequence[Rollout]) -> dict[str, float]:
    """Sentences that were left out in turn, a critique; the share of revised critiques that hang on a single one."""
    credited = [item for item in counted if item.credit]
    if not credited:
        return {}
    single = sum(sum(value != 0 for *_, value in item.credit) == 1 for item in credited)
    return {
        "rl/credited_sentences": sum(len(item.credit) for item in credited) / len(counted),
        "rl/single_decisive": single / len(credited),
    }


def record_file(folder: Path, step: int) -> Path:
    """Where the rollouts of a step are written."""
    return folder / f"step-{step:06d}.jsonl.gz"


def recorded(folder: Path, step: int) -> Path | None:
    """The file of a step's rollouts, compressed or not; None where the step was not recorded."""
    file = record_file(folder, step)
    return next((found for found in (file, file.with_suffix("")) if found.exists()), None)


def replay(folder: Path, step: int) -> list[Rollout]:
    """The recorded rollouts of a step. Raises ValueError when it was not recorded."""
    file = recorded(folder, step)
    if file is None:
        raise ValueError(f"rl.replay: {record_file(folder, step)} does not exist, nor without .gz")
    return jsonl.read(Rollout, file)


COLUMNS = [
    *("step", "solution_id", "problem", "draft", "draft_verdict", "critique", "judgement", "revision", "kept"),
    *("verdict", "detail", "reward", "reason", "weight_version"),
]
"""``draft`` is the program that was critiqued (the whole answer where it holds none), ``detail`` what went wrong in the
revision, ``kept`` whether the draft was kept because the critique judged it correct."""
Cell = str | float | bool | None


def rows(step: int, rollouts: Sequence[Rollout], drafts: Mapping[str, tuple[Problem, Solution]]) -> list[list[Cell]]:
    """Rows of ``COLUMNS``; ``drafts`` are problems and solutions by the solution's id."""
    return [_row(step, item, *drafts.get(item.solution_id, (None, None))) for item in rollouts]


def _row(step: int, item: Rollout, problem: Problem | None, draft: Solution | None) -> list[Cell]:
    verdict = draft.verdict if draft is not None else None
    known = "accepted" if item.draft_accepted else "not accepted"
    told = known
    if verdict is not None and item.turn == 1:
        told = verdict.status + (f": {verdict.detail}" if verdict.detail else "")
    return [
        step,
        item.solution_id,
        problem.prompt if problem is not None else None,
        item.draft if item.draft is not None else (draft.program or draft.text) if draft is not None else None,
        told,
        item.critique,
        item.judgement,
        item.revision,
        item.kept,
        item.status,
        item.detail,
        item.reward,
        item.reason,
        item.version,
    ]
