"""The order in which training data is taken: a pure function of the seed and the position, so that a run resumes."""

from __future__ import annotations

import random


def take(n: int, *, seed: int, start: int, count: int) -> list[int]:
    """Items ``start`` to ``start + count`` of an endless walk over ``n`` items, each pass in its own random order."""
    assert n > 0 and start >= 0 and count >= 0
    passes = {number: _pass(n, seed, number) for number in range(start // n, (start + count - 1) // n + 1)}
    return [passes[position // n][position % n] for position in range(start, start + count)]


def _pass(n: int, seed: int, number: int) -> list[int]:
    order = list(range(n))
    random.Random(f"data order, seed {seed}, pass {number}").shuffle(order)
    return order


def sampling_seed(seed: int, step: int, use: str) -> int:
    """A seed for one use of randomness at one step, independent of all others."""
    return random.Random(f"{use}, seed {seed}, step {step}").getrandbits(31)
