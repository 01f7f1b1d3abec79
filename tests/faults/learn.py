"""Learning under faults: a run on the test cluster that suffers a random fault again and again, and what it learned.

The driver is a job of its own. The end is a table of how long the run took to recover from each kind of fault, and a
comparison of its pass@1 with the confidence interval of an undisturbed run of the same configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recovery import Recovered
from striker import FAULTS, Planned, Striker
from strikes import JOB_FAULTS, Site, is_over

from ctrl_hpc import config as configuration

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "run.sbatch"
ON_CLUSTER = ("cluster=testcluster", "launch.executor.partition=low", "launch.executor.constraint=cpu")
"""Executors where they may be preempted."""
POLL_S = 2.0


def main() -> int:
    """Run, strike, compare; exit code 0 when the run ends within the interval."""
    options = _parse()
    conf = Path(os.environ.get("SLURM_CONF", ""))
    if not conf.with_name("cluster.json").is_file():
        print(
            "faults: SLURM_CONF names no test cluster; first: export $(slurm/testcluster/up | tail -1)", file=sys.stderr
        )
        return 2
    try:
        folder = Path(configuration.load(options.config, [*ON_CLUSTER, *options.overrides]).run_dir or "").absolute()
    except ValueError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    seed = random.SystemRandom().getrandbits(31) if options.seed is None else options.seed
    chance = random.Random(seed)
    names = options.faults or list(JOB_FAULTS)
    drawn = [name for _ in range(100) for name in chance.sample(names, len(names))]
    plan = [Planned(name=name, progress=0.0, delay_s=options.every * at) for at, name in enumerate(drawn, 1)]
    log = folder.parent / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["sbatch", "--parsable", "--partition=cpu", f"--output={log}", str(SCRIPT), options.config]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    submitted = subprocess.run(
        [*words, f"run_dir={folder}", *ON_CLUSTER, *options.overrides], env=environment, capture_output=True, text=True
    )
    if submitted.returncode != 0:
        print(f"faults: {submitted.stderr.strip()}", file=sys.stderr)
        return 1
    job = submitted.stdout.strip()
    print(f"faults: {folder}, a fault every {options.every:.0f} s, --seed {seed}; log: {log}", flush=True)
    striker = _strike_until_ended(folder, conf.parent, job, chance, plan)
    _show(striker.faults)
    results = folder / "report" / "results.json"
    if striker.failure is not None or not results.exists():
        print(f"faults: the run did not finish: {striker.failure or f'see {log}'}", file=sys.stderr)
        return 1
    return 0 if options.undisturbed is None else _compare(json.loads(results.read_text()), options.undisturbed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slurm/faults/learn", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the faults (default: a new one, printed)")
    parser.add_argument("--undisturbed", type=Path, metavar="RUN", help="run directory to compare with")
    parser.add_argument("--faults", nargs="+", choices=list(JOB_FAULTS), metavar="FAULT", help=", ".join(JOB_FAULTS))
    return parser.parse_intermixed_args()


def _strike_until_ended(folder: Path, base: Path, job: str, chance: random.Random, plan: Sequence[Planned]) -> Striker:
    """Strike while the driver's job is in the queue; on Ctrl-C the job is cancelled."""
    over: list[bool] = []
    site = Site(run_dir=folder, base=base, random=chance, ended=lambda: bool(over))
    began = time.monotonic()
    striker = Striker(site, plan, lambda text: print(f"faults: {text}", flush=True))
    striker.start()
    try:
        while not is_over(job):
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        site.command("scancel", job)
        raise
    finally:
        over.append(True)
        striker.join()
    print(f"faults: {len(striker.faults)} faults in {time.monotonic() - began:.0f} s")
    return striker


def _show(faults: Sequence[Recovered]) -> None:
    """Recovery by kind of fault: how many, and seconds. A fault that overlapped a graver one may take as long as it."""
    print(f"{'fault':28s} {'n':>3s} {'median':>7s} {'longest':>7s}  allowed")
    for name in sorted({fault.name for fault in faults}):
        over = [fault for fault in faults if fault.name == name and fault.recovery_s is not None]
        times = [fault.recovery_s or 0.0 for fault in over]
        if times:
            late = sum(time > fault.limit_s for time, fault in zip(times, over, strict=True))
            row = f"{statistics.median(times):6.1f}s {max(times):6.1f}s {FAULTS[name].recovers_in_s:7.0f}s"
            print(f"{name:28s} {len(times):3d} {row}{f'  {late} LATE' if late else ''}")


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
