"""Chunks of a step's drafts, on their way side by side, each in a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait


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
