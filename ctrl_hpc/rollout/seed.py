"""Seeds of single completions, derived so that they do not depend on how requests are batched."""

from __future__ import annotations

import hashlib

SEED_BITS = 31
"""Derived seeds fit a signed 32-bit integer, which every inference server takes."""


def derive_seed(seed: int, *indices: int) -> int:
    """The seed of one completion, in [0, 2^31): a hash of the run's seed and the completion's indices."""
    text = ",".join(str(int(part)) for part in (seed, *indices))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)
