"""The drafts that a stage trains on: their chats as token ids, taken in order, worked on in chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.data.problems import read as read_problems
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Chat, Critique, Problem, Solution
from ctrl_hpc.rollout.chat import chat_ids, text_ids
from ctrl_hpc.seeds import take


def response_ids(tokenizer: Any, critique: Critique) -> Sequence[int]:
    """A critique as the critic would write it, up to the end of its turn."""
    generation = critique.generation
    if generation is not None and generation.token_ids:
        ids = generation.token_ids
        whole = generation.finish_reason == "stop"
    else:
        text = critique.text if generation is None else generation.text
        ids, whole = tuple(text_ids(tokenizer, text)), True
    return (*ids, tokenizer.eos_token_id) if whole and ids[-1:] != (tokenizer.eos_token_id,) else ids


def side_by_side[A, B](work: Callable[[A], B], items: Sequence[A], at_once: int) -> list[B]:
    """``work`` of every item, in order, ``at_once`` at a time.

    Raises the first error at once: no further item is begun then, and those in hand are left to end by themselves.
    """
    if len(items) == 1:
        return [work(items[0])]
    threads = ThreadPoolExecutor(min(at_once, len(items)), "chunks")
    try:
        futures = [threads.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


_TEMPLATE_TOKENS = 64
"""A chat template adds fewer tokens to a message, and as a system message of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPool:
    """Problems with drafts whose verdict is known."""

    pairs: tuple[tuple[Problem, Solution], ...]
    seed: int

    @classmethod
    def load(cls, run_dir: Path, seed: int) -> Self:
        """The drafts of stage ``sample``; those that an environment's fault left without a verdict are not used.

        Raises ValueError when none is left.
        """
        problems = {problem.id: problem for problem in read_problems(run_dir / "problems" / "train.jsonl")}
        file = run_dir / "sample" / "solutions.jsonl"
        solutions = [item for item in jsonl.iterate(Solution, file) if item.verdict is not None]
        known = [item for item in solutions if item.verdict is not None and item.verdict.status != "sandbox_error"]
        if not known:
            raise ValueError(f"rl: {file} holds no executed draft")
        return cls(pairs=tuple((problems[item.problem_id], item) for item in known), seed=seed)

    def fitting(self, prompts: Prompts, tokenizer: Any, limit: int, **template: bool) -> Self:
        """The drafts whose critique prompt has at most ``limit`` tokens; says how many are left out.

        Raises ValueError when none is left.
        """
        kept = tuple(pair for pair in self.pairs if fits(prompts.critique(*pair), tokenizer, limit, **template))
        if not kept:
            raise ValueError(
                f"rl: the critique prompt of each of the {len(self.pairs)} drafts is longer than {limit} tokens; raise "
                "rl.max_prompt_tokens, or trainer.micro_batch_tokens"
            )
        if len(kept) < len(self.pairs):
            left_out = len(self.pairs) - len(kept)
            print(f"rl: {left_out} of {len(self.pairs)} drafts left out: their prompts have more than {limit} tokens")
        return replace(self, pairs=kept)

    def draw(self, position: int, count: int, used: Collection[str] = ()) -> list[tuple[Problem, Solution]]:
        """The ``count`` drafts from ``position`` on; none twice and none of ``used``, so fewer in a small pool."""
        rows = take(len(self.pairs), seed=self.seed, start=position, count=count)
        return [self.pairs[row] for row in dict.fromkeys(rows) if self.pairs[row][1].id not in used]


def fits(chat: Chat, tokenizer: Any, limit: int, **template: bool) -> bool:
    """Whether a chat, with variables of its template, has at most ``limit`` tokens.

    A token has a byte at least: short chats need no counting.
    """
    n_bytes = sum(len(message.content.encode()) for message in chat)
    return n_bytes + _TEMPLATE_TOKENS * (len(chat) + 1) <= limit or len(chat_ids(tokenizer, chat, **template)) <= limit
