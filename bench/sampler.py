"""What ``top_p < 1`` costs a decoding step: the sampler beside itself at ``top_p=1``, and transformers' warper.

Logits are made, of a real vocabulary's size: a few likely tokens over a Gaussian rest, as a language model's are; the
flat ones are a Gaussian rest alone, the worst case, whose nucleus is half the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import TopPLogitsWarper

from ctrl_hpc.rollout.decoding import Decoding
from ctrl_hpc.rollout.sampler import Sampler


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2] * 1e3


def logits(rows: int, vocabulary: int, likely: int) -> torch.Tensor:
    """``[rows, vocabulary]`` of which ``likely`` columns stand out."""
    made_BV = torch.randn(rows, vocabulary) * 2.0
    if likely:
        made_BV[:, :likely] += torch.linspace(14.0, 5.0, likely)
    return made_BV


def main() -> None:
    """Print one JSON line a kind of logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="requests of a batch (default: 32)")
    parser.add_argument("--vocabulary", type=int, default=151936, help="tokens (default: Qwen2.5's 151936)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for kind, likely in (("peaked", 50), ("flat", 0)):
        logits_BV = logits(options.rows, options.vocabulary, likely)

        def step(top_p: float, logits_BV: torch.Tensor = logits_BV) -> Callable[[], object]:
            decodings = [Decoding(seed=row, top_p=top_p) for row in range(options.rows)]
            sampler = Sampler(decodings, 1, torch.device("cpu"))
            return lambda: sampler.draw(logits_BV, 0)

        def transformers(logits_BV: torch.Tensor = logits_BV) -> object:
            warped_BV = TopPLogitsWarper(options.top_p)(None, logits_BV)
            return torch.multinomial(warped_BV.softmax(dim=-1), 1)

        whole, cut = milliseconds(step(1.0), options.repeats), milliseconds(step(options.top_p), options.repeats)
        peer = milliseconds(transformers, options.repeats)
        print(
            json.dumps(
                {
                    "logits": kind,
                    "top_p_1_ms": round(whole, 2),
                    "top_p_ms": round(cut, 2),
                    "factor": round(cut / whole, 2),
                    "transformers_top_p_ms": round(peer, 2),
                }
            )
        )


if __name__ == "__main__":
    main()
