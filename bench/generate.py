"""Decoding by the rollout server's engine beside transformers' ``generate``: one model and type, one process, in turns.

Both sample at temperature 1 from the same prompts, each to the same length, stop tokens not heeded. Wall times differ
where the machine is shared; the processor's own seconds tell the work. Tokens a second are those of the completions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from ctrl_hpc.rollout.decoding import Decoding
from ctrl_hpc.rollout.engine import DTYPES, load_engine

TEXT = "Write a Python function that returns the {} smallest numbers of a list, in ascending order, without sorting it."


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--rows", type=int, default=32, help="requests of a batch (default: 32)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a completion (default: 24)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; the quickest counts (default: 2)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer.encode(TEXT.format(row + 2)) for row in range(options.rows)]
    peer: Any = load_engine(options.model, device="cpu", dtype=options.dtype)
    plain = type(peer.model).from_pretrained(options.model, dtype=DTYPES[options.dtype]).eval()
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    real_BP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def ours() -> None:
        decodings = [Decoding(max_tokens=options.tokens, seed=row, ignore_eos=True) for row in range(options.rows)]
        made = peer.generate(prompts, decodings)
        assert all(len(item.token_ids) == options.tokens for item in made)

    def theirs() -> None:
        length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        with torch.inference_mode():
            made = plain.generate(ids_BP, attention_mask=real_BP, do_sample=True, top_k=0, top_p=1.0, **length)
        assert made.shape[1] == width + options.tokens

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    for _ in range(options.rounds):
        times["ours"].append(seconds(ours))
        times["transformers"].append(seconds(theirs))
    (wall, cpu), (their_wall, their_cpu) = (tuple(map(min, zip(*found, strict=True))) for found in times.values())
    count = options.rows * options.tokens
    print(
        json.dumps(
            {
                "model": options.model,
                "dtype": options.dtype,
                "rows": options.rows,
                "tokens_per_s": round(count / wall, 1),
                "transformers_tokens_per_s": round(count / their_wall, 1),
                "speedup": round(their_wall / wall, 2),
                "cpu_s": round(cpu, 2),
                "transformers_cpu_s": round(their_cpu, 2),
                "speedup_cpu": round(their_cpu / cpu, 2),
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
