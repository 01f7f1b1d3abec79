"""The prompts of a batch: common beginnings once, against all prompts as one padded batch; one process, in turns.

The prompts are those of revisions in an RL step: drafts of several lengths, each with several critiques.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time

import torch

from ctrl_hpc.records import Sampling
from ctrl_hpc.rollout.engine import DTYPES, load_engine
from ctrl_hpc.rollout.kv_cache import Recent


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--drafts", type=int, default=8, help="beginnings (default: 8)")
    parser.add_argument("--critiques", type=int, default=4, help="prompts with each (default: 4)")
    parser.add_argument("--draft-tokens", type=int, default=400, help="a beginning, 3/4 to 5/4 of it (default: 400)")
    parser.add_argument("--critique-tokens", type=int, default=110, help="the rest, likewise (default: 110)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; the quickest counts (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = random.Random(0)

    def text(tokens: int) -> list[int]:
        return [draw.randrange(1000, 20000) for _ in range(draw.randrange(3 * tokens // 4, 5 * tokens // 4 + 1))]

    beginnings = [text(options.draft_tokens) for _ in range(options.drafts)]
    prompts = [begun + text(options.critique_tokens) for begun in beginnings for _ in range(options.critiques)]
    engine = load_engine(options.model, device="cpu", dtype=options.dtype, batching="padded")
    seconds: dict[str, list[float]] = {"padded": [], "apart": []}
    for _ in range(options.rounds):
        for name, recent in (("padded", None), ("apart", Recent(0))):
            engine._recent = recent  # type: ignore[attr-defined]
            started = time.perf_counter()
            engine.generate(prompts, [Sampling(temperature=0.0, max_tokens=1)] * len(prompts))
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "model": options.model,
                "dtype": options.dtype,
                "prompts": len(prompts),
                "tokens": sum(map(len, prompts)),
                **{f"{name}_s": round(value, 2) for name, value in best.items()},
                "speedup": round(best["padded"] / best["apart"], 2),
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
