"""Learning under faults: a run on the test cluster that suffers a random fault again and again, and what it learned.

The last line compares its pass@1 with the confidence interval of an undisturbed run of the same configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from strikes import FAULTS, Site, Striker

import ctrl_hpc

LEFT_OUT = ("preempt", "full disk", "full disk in training", "kill driver", "time limit")
"""Faults that need a set-up of their own: a partition, a disk, a driver that is a job."""


def main() -> int:
    """Run, strike, compare; exit code 0 when the run ends within the interval."""
    options = _parse()
    conf = Path(os.environ.get("SLURM_CONF", ""))
    if not conf.with_name("cluster.json").is_file():
        print(
            "faults: SLURM_CONF names no test cluster; first: export $(slurm/testcluster/up | tail -1)", file=sys.stderr
        )
        return 2
    seed = random.SystemRandom().getrandbits(31) if options.seed is None else options.seed
    chance = random.Random(seed)
    names = [name for name in FAULTS if name not in LEFT_OUT]
    plan = [(options.every, chance.choice(names)) for _ in range(1000)]
    run = ctrl_hpc.launch(options.config, "cluster=testcluster", *options.overrides)
    print(f"faults: {run.folder}, a fault every {options.every:.0f} s, --seed {seed}; log: {run.log}", flush=True)
    site = Site(run_dir=run.folder, base=conf.parent, random=chance, ended=lambda: run.driver.poll() is not None)
    began = time.monotonic()
    striker = Striker(site, plan, lambda text: print(f"faults: {text}", flush=True))
    striker.start()
    try:
        run.wait()
    finally:
        run.stop()
        striker.join()
    results = run.results()
    print(f"faults: {len(striker.strikes)} faults in {time.monotonic() - began:.0f} s")
    return 0 if options.undisturbed is None else _compare(results, options.undisturbed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slurm/faults/learn", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the faults (default: a new one, printed)")
    parser.add_argument("--undisturbed", type=Path, metavar="RUN", help="run directory to compare with")
    return parser.parse_intermixed_args()


def _compare(disturbed: dict[str, object], undisturbed: Path) -> int:
    fair = json.loads((undisturbed / "report" / "results.json").read_text())
    outside = 0
    for dataset, entry in fair["datasets"].items():
        for critic, row in entry["critics"].items():
            low, high = row["ci95"]["pass_at_1"]
            got = disturbed["datasets"][dataset]["critics"][critic]["pass_at_1"][1]  # type: ignore[index]
            inside = low <= got <= high
            outside += not inside
            verdict = "inside" if inside else "OUTSIDE"
            print(f"{dataset}/{critic}: pass@1 {got:.3f}, undisturbed {low:.3f} to {high:.3f}: {verdict}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
