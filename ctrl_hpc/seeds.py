"""Seeds and orders, pure functions of the run's seed and a position: nothing depends on batching or restarts."""

from __future__ import annotations

import hashlib
import random

_SEED_BITS = 31
"""Derived seeds fit a signed 32-bit integer, which every inference server takes."""


def derive_seed(seed: int, *indices: int) -> int:
    """The seed of one completion, in [0, 2^31): a hash of the run's seed and the completion's indices."""
    text = ",".join(str(int(part)) for part in (seed, *indices))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _SEED_BITS)


def evaluation_seed(seed: int, *parts: object) -> int:
    """A seed of its own for a named part of the evaluation, in [0, 2**31)."""
    text = " ".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


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
