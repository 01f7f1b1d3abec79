"""What decontamination costs: seconds for ever more training and benchmark problems, of which a share is shorter than
an n-gram; linear when the last column stays level.

    python bench/decontamination.py [--words 200] [--short 0.5]
"""

from __future__ import annotations

import argparse
import random
import time

from ctrl_hpc.data.decontamination import decontaminate
from ctrl_hpc.records import Problem

SIZES = ((1000, 500), (2000, 1000), (4000, 2000), (8000, 4000))
"""Training and benchmark problems."""
VOCABULARY = 5000


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=200, help="words of a statement (default: 200)")
    parser.add_argument(
        "--short", type=float, default=0.5, help="share of benchmark statements of 9 words (default: 0.5)"
    )
    options = parser.parse_args()
    draw = random.Random(0)
    print(f"{'training':>9} {'benchmark':>9} {'s':>8} {'us a problem':>13}")
    for n_training, n_benchmark in SIZES:
        training = [problem(draw, number, options.words) for number in range(n_training)]
        lengths = [9 if draw.random() < options.short else options.words for _ in range(n_benchmark)]
        benchmark = [problem(draw, number, length) for number, length in enumerate(lengths)]
        started = time.perf_counter()
        kept, left_out = decontaminate(training, {"benchmark": benchmark})
        seconds = time.perf_counter() - started
        assert len(kept) + len(left_out) == n_training
        print(f"{n_training:9} {n_benchmark:9} {seconds:8.2f} {1e6 * seconds / (n_training + n_benchmark):13.0f}")


def problem(draw: random.Random, number: int, words: int) -> Problem:
    """A statement of random words."""
    text = " ".join(f"word{draw.randrange(VOCABULARY)}" for _ in range(words))
    return Problem(id=str(number), source="s", split="train", prompt=text, tests=())


if __name__ == "__main__":
    main()
