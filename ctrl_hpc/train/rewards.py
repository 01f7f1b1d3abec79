"""The reward as ``rl`` asks for it at a step: coefficients that change over the steps, or a function of the user's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from ctrl_hpc.config import RLConfig
from ctrl_hpc.config.functions import load_function
from ctrl_hpc.config.objectives import at_step
from ctrl_hpc.flow.reward import score, score_by, score_verdict
from ctrl_hpc.records import Critique, Problem, Revision, Reward, Solution

SCHEDULED = ("verdict_coef", "verdict_only_share", "leak_penalty", "overlong_penalty")
"""Coefficients that may be schedules, beside each of ``transition_reward``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What critiques of one step are rewarded for."""

    verdict_coef: float
    verdict_only_share: float
    leak_penalty: float
    overlong_penalty: float
    overlong_buffer: int
    longest: int
    """Tokens that a critique may have."""
    transitions: Mapping[str, float]
    function: str | None
    """FILE.py:FUNCTION in place of these."""

    @classmethod
    def at(cls, options: RLConfig, step: int, *, longest: int | None = None) -> Self:
        """Those of a step, counted from 0; ``longest``: tokens that a critique may have, else ``rl.max_tokens``."""
        return cls(
            **{name: at_step(getattr(options, name), step) for name in SCHEDULED},
            transitions={name: at_step(value, step) for name, value in options.transition_reward.items()},
            overlong_buffer=options.overlong_buffer,
            longest=options.max_tokens if longest is None else longest,
            function=options.reward,
        )

    def score(
        self,
        samples: Sequence[tuple[Problem, Solution, Critique, Revision]],
        judged_alone: Collection[str] = (),
    ) -> list[Reward]:
        """The reward of executed samples; those of the drafts ``judged_alone``, by id, for the judgement.

        A sample for which the user's function fails is masked, and the first is told.
        """
        out, faults = [], []
        for problem, draft, critique, revision in samples:
            if draft.verdict is not None and draft.id in judged_alone:
                out.append(score_verdict(critique, draft.verdict))
                continue
            try:
                out.append(self._score(problem, draft, critique, revision))
            except Exception as error:
                if self.function is None:
                    raise
                faults.append(f"rl.reward: {self.function} failed for {critique.id}: {type(error).__name__}: {error}")
                out.append(Reward(critique_id=critique.id, value=0.0, reason="reward_error", masked=True))
        if faults:
            print(f"{faults[0]}; {len(faults)} of {len(samples)} critiques are left out", flush=True)
        return [
            reward if reward.masked else replace(reward, value=reward.value - self._overlong(critique))
            for reward, (_, _, critique, _) in zip(out, samples, strict=True)
        ]

    def _overlong(self, critique: Critique) -> float:
        """DAPO's soft overlong punishment (arXiv 2503.14476): from 0 at the buffer's begin to all at its end."""
        if self.overlong_buffer == 0 or critique.generation is None:
            return 0.0
        over = len(critique.generation.token_ids) - (self.longest - self.overlong_buffer)
        return self.overlong_penalty * min(1.0, max(0.0, over / self.overlong_buffer))

    def _score(self, problem: Problem, draft: Solution, critique: Critique, revision: Revision) -> Reward:
        if self.function is not None:
            return score_by(load_function("rl.reward", self.function), problem, draft, critique, revision)
        assert draft.verdict is not None
        return score(
            critique,
            revision,
            draft.verdict,
            verdict_coef=self.verdict_coef,
            transitions=self.transitions,
            leak_penalty=self.leak_penalty,
            draft_program=draft.program,
        )


def returns(values: Sequence[float], options: RLConfig) -> list[float]:
    """What each turn's critique of an episode is worth, from the reward of each; for one turn that reward itself.

    With rewards v(1) to v(T), of at most K turns, and g = ``turn_discount``, turn t is worth

        last   g^(T - t) v(T)
        each   sum over s = t..K of g^(s - t) v(min(s, T)), over the sum of the weights: stopping early costs nothing
        gain   sum over s = t..T of g^(s - t) (v(s) - v(s - 1)), with v(0) = 0
    """
    count, discount = len(values), options.turn_discount
    if options.turn_reward == "last":
        return [discount ** (count - 1 - turn) * values[-1] for turn in range(count)]
    if options.turn_reward == "each":
        length, padded = options.turns, [*values, *[values[-1]] * (options.turns - count)]
    else:
        length, padded = count, [now - before for now, before in zip(values, [0.0, *values], strict=False)]
    out = []
    for turn in range(count):
        weights = [discount ** (later - turn) for later in range(turn, length)]
        total = sum(weight * value for weight, value in zip(weights, padded[turn:], strict=True))
        out.append(total / sum(weights) if options.turn_reward == "each" else total)
    return out
