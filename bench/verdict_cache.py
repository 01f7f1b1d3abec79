"""The verdict cache at 10^3 to 10^6 entries: seconds of a put, a hit and a miss, memory, bytes and files.

``python bench/verdict_cache.py [ENTRIES ...]``. The folder is a temporary one (``--folder`` for another file system).
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ctrl_hpc.records import Summary, TestResult, Verdict
from ctrl_hpc.sandbox.cache import VerdictCache

WRONG = Verdict(
    status="wrong_answer",
    tests=(TestResult(status="wrong_answer", stdout=b"12345\n" * 8, exit_code=0, cpu_s=0.01, wall_s=0.02, index=7),),
    detail="test 8 of 100: wrong_answer",
    summary=Summary(statuses=(("accepted", 7), ("wrong_answer", 93)), cpu_s=1.25, wall_s=2.5, peak_memory_mb=11.0),
)
"""As a program earns it that fails one of 100 tests."""


def measure(folder: Path, sizes: list[int], repeats: int = 300) -> list[dict[str, float]]:
    """A row for each number of entries, which are put one after another."""
    cache = VerdictCache(folder / "verdicts", 4096)
    rows, done = [], 0
    for size in sizes:
        while done < size:
            cache.put(_key(done), WRONG)
            done += 1
        row = {
            "entries": float(size),
            "put_us": _median_us(lambda key: cache.put(key, WRONG), [f"{size} {n}" for n in range(repeats)]),
            "hit_us": _median_us(cache.get, random.choices(range(size), k=repeats)),
            "miss_us": _median_us(cache.get, [f"miss {size} {n}" for n in range(repeats)]),
        }
        started = time.perf_counter()
        fresh = VerdictCache(folder / "verdicts", 4096)
        assert fresh.get(_key(size // 2)) == WRONG
        row["open_s"] = time.perf_counter() - started
        fresh.close()
        files = list((folder / "verdicts").iterdir())
        row |= {"files": len(files), "bytes_an_entry": sum(file.stat().st_size for file in files) / size}
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(row)
    cache.close()
    return rows


def _key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def _median_us(step: Callable[[str], object], names: Iterable[object]) -> float:
    times = []
    for key in map(_key, names):
        started = time.perf_counter()
        step(key)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entries", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put the cache (default: a temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in measure(Path(folder), sorted(options.entries)):
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
