"""JudgeBench: how often a critic finds the right one of two answers, by category and number of votes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.evaluate.metrics import bootstrap_weights, interval
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.comparison import Side, compared, comparison_chat, comparison_template, judged_apart, parse_choice
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique
from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import Generator, Pair, Problem, Sampling, Solution
from ctrl_hpc.seeds import evaluation_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """What a critic said about one pair, in the order in which it was asked.

    pointwise: its judgements of answer A and of answer B, each a word of ``Judgement`` or "none"; pairwise: the better
    answer, "A", "B" or "none" as it was shown, with the answers in their places and with their places swapped.
    """

    pair: str
    first: tuple[str, ...]
    second: tuple[str, ...]


def pairs_file(run_dir: Path) -> Path:
    """Where the run's pairs lie, beside its problems."""
    return run_dir / "problems" / "judgebench.jsonl"


def votes_file(run_dir: Path, critic: str) -> Path:
    """Where a critic's votes lie."""
    return run_dir / "eval" / "judgebench" / f"{critic}.jsonl"


def judge(config: Config, run_dir: Path, name: str, critic: Generator | None, prompts: Prompts) -> None:
    """Ask a critic about every pair, unless it has been asked; ``critic`` may be None when it has."""
    pairs = jsonl.read(Pair, pairs_file(run_dir))
    sampling = Sampling(temperature=config.eval.temperature, max_tokens=config.eval.max_tokens)
    ask = {"pointwise": _pointwise, "pairwise": _pairwise}[config.judge.mode]

    def work(part: Sequence[Pair], number: int, log: WriteAheadLog) -> list[Votes]:
        assert critic is not None, f"{name} has not been asked and is not served"
        seeds = [evaluation_seed(config.seed, "judgebench", name, number, side) for side in (0, 1)]
        return ask(config, part, number, log, critic, prompts, [replace(sampling, seed=seed) for seed in seeds])

    size = max(config.eval.chunk // max(config.judge.votes), 1)
    in_parts(votes_file(run_dir, name), Votes, pairs, work, size=size, at_once=config.eval.chunks_in_flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """The votes of one request, as the log keeps them."""

    votes: tuple[str, ...]


def _pointwise(
    config: Config,
    pairs: Sequence[Pair],
    number: int,
    log: WriteAheadLog,
    critic: Generator,
    prompts: Prompts,
    sampling: Sequence[Sampling],
) -> list[Votes]:
    """Each answer critiqued by itself, as a draft; the order of the two cannot matter."""
    n = max(config.judge.votes)

    def asked(side: int) -> Callable[[], list[_Said]]:
        answers = [pair.answer_b if side else pair.answer_a for pair in pairs]
        samples = [_sample(pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
        return lambda: _grouped(
            [item.judgement for item in critique(samples, critic, prompts, replace(sampling[side], n=n))], n
        )

    sides = [log.once(f"answer {side}", number, _Said, asked(side)) for side in (0, 1)]
    return _votes(pairs, sides)


def _sample(pair: Pair, answer: str) -> tuple[Problem, Solution]:
    problem = Problem(id=pair.id, source="judgebench", split="test", prompt=pair.question, tests=())
    return problem, Solution(id=pair.id, problem_id=pair.id, text=answer, program=extract_program(answer))


def _pairwise(
    config: Config,
    pairs: Sequence[Pair],
    number: int,
    log: WriteAheadLog,
    critic: Generator,
    prompts: Prompts,
    sampling: Sequence[Sampling],
) -> list[Votes]:
    """Both answers shown at once; with ``judge.swap`` half of the votes (rounded up) see them in the other order."""
    n = max(config.judge.votes)
    counts = (n // 2 + n % 2, n // 2 + n % 2) if config.judge.swap else (n, 0)
    template = comparison_template(config.judge.template)

    def asked(side: int) -> Callable[[], list[_Said]]:
        shown = [(pair.answer_b, pair.answer_a) if side else (pair.answer_a, pair.answer_b) for pair in pairs]
        chats = [
            comparison_chat(template, prompts.system, pair.question, *answers)
            for pair, answers in zip(pairs, shown, strict=True)
        ]
        return lambda: [
            _Said(votes=tuple(parse_choice(item.text) or "none" for item in generations))
            for generations in critic.complete(chats, replace(sampling[side], n=counts[side]))
        ]

    sides = [
        log.once(f"order {side}", number, _Said, asked(side)) if count else [_Said(votes=())] * len(pairs)
        for side, count in enumerate(counts)
    ]
    return _votes(pairs, sides)


def _grouped(judgements: Sequence[str | None], n: int) -> list[_Said]:
    said = [judgement or "none" for judgement in judgements]
    return [_Said(votes=tuple(said[start : start + n])) for start in range(0, len(said), n)]


def _votes(pairs: Sequence[Pair], sides: Sequence[Sequence[_Said]]) -> list[Votes]:
    return [
        Votes(pair=pair.id, first=first.votes, second=second.votes)
        for pair, first, second in zip(pairs, *sides, strict=True)
    ]


def winners(mode: str, votes: Votes, n: int) -> list[Side | None]:
    """What each group of ``n`` successive votes decides; votes left over count for nothing.

    pointwise: n judgements of each answer. pairwise with both orders: n votes in all, of n = 1 in the given order.
    """
    first, second = [[None if vote == "none" else vote for vote in side] for side in (votes.first, votes.second)]
    decide: Any = judged_apart if mode == "pointwise" else compared
    if mode == "pointwise":
        size, other = n, n
    elif second and n > 1:
        size, other = n - n // 2, n // 2
    else:
        size, other = n, 0
    groups = len(first) // size
    return [
        decide(first[g * size : (g + 1) * size], second[g * other : (g + 1) * other])
        for g in range(groups)
        if len(second[g * other : (g + 1) * other]) == other
    ]


def numbers(config: Config, run_dir: Path, critics: Sequence[str]) -> dict[str, Any]:
    """``results.json``'s part on JudgeBench: accuracy by critic, category and number of votes, with intervals.

    A group's accuracy is the mean over the pairs' groups of votes; no decision counts as wrong.
    """
    pairs = jsonl.read(Pair, pairs_file(run_dir))
    weights_BP = bootstrap_weights(len(pairs), config.eval.bootstrap, config.seed)
    out: dict[str, Any] = {}
    for name in critics:
        votes = {item.pair: item for item in jsonl.read(Votes, votes_file(run_dir, name))}
        shares = {
            n: np.array([_share(config.judge.mode, pair, votes[pair.id], n) for pair in pairs]) for n in _n(config)
        }
        rows = {}
        for category in ["overall", *(name for name, _ in Counter(pair.category for pair in pairs).most_common())]:
            chosen_P = np.array([category in ("overall", pair.category) for pair in pairs], dtype=float)
            size_B = weights_BP @ chosen_P
            rows[category] = {
                "n_pairs": int(chosen_P.sum()),
                "accuracy": {str(n): float(share_P @ chosen_P / chosen_P.sum()) for n, share_P in shares.items()},
                "ci95": {
                    str(n): interval((weights_BP @ (share_P * chosen_P)) / np.maximum(size_B, 1.0))
                    for n, share_P in shares.items()
                },
            }
        out[name] = rows
    return {"mode": config.judge.mode, "swap": config.judge.swap, "n_pairs": len(pairs), "critics": out}


def _n(config: Config) -> list[int]:
    return sorted(set(config.judge.votes))


def _share(mode: str, pair: Pair, votes: Votes, n: int) -> float:
    found = winners(mode, votes, n)
    assert found, f"{pair.id}: fewer than {n} votes"
    return sum(winner == pair.right for winner in found) / len(found)
