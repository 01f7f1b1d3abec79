"""Check the kernels, then time them against their peers and against what the machine can do.

    python kernels/bench/run.py [--out FOLDER] [--budget-s 480] [--only FAMILY ...] [--smoke]

Needs a CUDA GPU; ``--smoke`` runs every row at tiny shapes on a CPU instead, the kernels in Triton's interpreter, to
see that all of it works (its times mean nothing). Writes results.json, results.md and results.png to the folder, by
default ``kernels/bench/results/GPU``. What the time budget leaves out, and peers that are not installed, are named.
Exit code 1 if one of our kernels fails or is not exact enough, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # ctrl_kernels, where the project is not installed

import accuracy
import cases
import goals
import peers
import report
import torch
import torch.distributed as dist
import triton
from cases import Case, Contender, Family
from measure import Clock, Limits
from triton.errors import TritonError

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    LookupError,
    OSError,
    TritonError,
)
"""What a peer may end in without ending the run: the reason goes into the results."""

FAMILIES: tuple[Family, ...] = ("logits", "linear", "one pass", "group advantages", "gae", "policy loss")
VOCABULARY = 152_064
COMPILED = {("logits", 8192, 1), ("logits", 32768, 1), ("linear", 8192, 1), ("policy loss", 1024, 1)}
"""Family, rows and shards at which torch.compile takes part: each shape takes it many seconds to compile."""


@dataclass(slots=True, kw_only=True)
class Run:
    """What a run has found so far."""

    clock: Clock
    limits: Limits
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def time(self, contender: Contender, inputs: cases.Inputs) -> None:
        """Add a row, or the reason why there is none."""
        case = inputs.case
        label = f"{contender.name} [{case.family}]"
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{contender.name}: {case.name}")
            return
        if label in self.skipped:
            return
        print(f"  {case.name}: {contender.name}", file=sys.stderr, flush=True)
        try:
            found = self._measure(contender, inputs)
        except ImportError as error:
            self.skipped[label] = f"not installed: {error}"
            return
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        except FAILURES as error:
            found = {"failed": reason(error)}
        names = {"case": case.name, "contender": contender.name, "ours": contender.ours}
        names["captured"] = contender.captured
        self.rows.append(names | asdict(case) | found)

    def _measure(self, contender: Contender, inputs: cases.Inputs) -> dict[str, Any]:
        forward = contender.make(inputs)
        if contender.results == "values":
            clock = self.clock.device_milliseconds if contender.captured else self.clock.milliseconds
            forward_ms = clock(forward) if not contender.slow else self.clock.once_ms(forward)
            return rates(contender, inputs.case, self.limits, forward_ms, None) | {"peak_mb": None}

        def total() -> Any:
            outputs = forward()
            upstream = inputs.upstream[: len(outputs)] if inputs.upstream else None
            if contender.results in ("sum", "loss"):
                upstream = None
            return torch.autograd.grad(outputs, inputs.leaves, upstream)

        if contender.captured:
            total()
            total_ms = self.clock.device_milliseconds(total)
            return rates(contender, inputs.case, self.limits, total_ms, 0.0) | {"peak_mb": self.clock.peak_mb(total)}
        timing = self.clock.forward_and_backward(forward, total)
        found = rates(contender, inputs.case, self.limits, timing.forward_ms, timing.backward_ms)
        return found | {"peak_mb": timing.peak_mb}


def reason(error: BaseException) -> str:
    """One short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def rates(
    contender: Contender, case: Case, limits: Limits, forward_ms: float, backward_ms: float | None
) -> dict[str, Any]:
    """Times, and what part of the machine's limits they are: of bandwidth, or of matrix operations."""
    backward = 0.0 if backward_ms is None else backward_ms
    found: dict[str, Any] = {"forward_ms": forward_ms, "backward_ms": backward_ms, "total_ms": forward_ms + backward}
    bandwidth = limits.copy_tb_per_s * 1e9  # bytes a millisecond
    elements = case.rows * case.columns
    if case.family == "logits":
        found["forward_limit"] = 2 * elements / forward_ms / bandwidth
        if backward > 0:
            found["backward_limit"] = 4 * elements / backward / bandwidth
    elif case.family in ("gae", "policy loss"):
        found["forward_limit"] = (17 if case.family == "gae" else 21) * elements / forward_ms / bandwidth
    elif contender.products is not None:
        operations = elements * case.width / 1e9  # a millisecond's worth at 1 TFLOP/s
        for part, count, ms in zip(("forward", "backward"), contender.products, (forward_ms, backward), strict=True):
            if count and ms > 0:
                found[f"{part}_tflop_per_s"] = count * operations / ms
                found[f"{part}_limit"] = found[f"{part}_tflop_per_s"] / limits.matmul_tflop_per_s
    return found


def shapes(*, smoke: bool) -> Iterator[Case]:
    """Every case; the families that cost little first, so that the budget cuts none of their contenders."""
    for n in (16,) if smoke else (1024, 4096, 16384):
        yield Case(family="group advantages", rows=n)
    for n, steps in ((2, 40),) if smoke else ((512, 4096), (1024, 8192)):
        yield Case(family="gae", rows=n, columns=steps)
    yield Case(family="policy loss", rows=2 if smoke else 1024, columns=40 if smoke else 8192)
    shards = (1, 2) if smoke else (1, 2, 4, 8)
    vocabulary, widths, rows = (320, (16,), (8,)) if smoke else (VOCABULARY, (3584, 5120), (8192, 32768))
    for n in rows:
        for count in shards:
            yield Case(family="logits", rows=n, columns=vocabulary // count, shards=count)
        for width in widths:
            for count in shards:
                for family in ("linear", "one pass"):
                    yield Case(family=family, rows=n, columns=vocabulary // count, width=width, shards=count)  # type: ignore[arg-type]


def takes_part(contender: Contender, case: Case, *, smoke: bool) -> bool:
    """Whether a contender is timed at a case."""
    if case.family not in contender.families:
        return False
    return contender.name != "torch.compile" or smoke or (case.family, case.rows, case.shards) in COMPILED


def compare(run: Run, everyone: list[Contender], chosen: list[Case], *, smoke: bool) -> None:
    """Ours at every shape, then the others, the smaller shapes first, until the time is over."""
    for turn in (True, False):
        for case in chosen:
            contenders = [c for c in everyone if c.ours == turn and takes_part(c, case, smoke=smoke)]
            if not contenders:
                continue
            inputs = cases.inputs(case, run.clock.device)
            for contender in contenders:
                run.time(contender, inputs)
            del inputs


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "peers": ", ".join(f"{name} {version}" for name, version in peers.versions().items()),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: kernels/bench/results/GPU")
    parser.add_argument("--budget-s", type=float, default=480.0, help="no measurement begins later; default: 480")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--contenders", nargs="+", help="only those whose names hold one of these words")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, interpreted")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; --smoke runs without one")
    if arguments.smoke and arguments.out is None:
        parser.error("--smoke needs --out FOLDER: its times are no results")
    return arguments


def main() -> int:
    """Check, time, write."""
    began = time.monotonic()
    arguments = parse()
    smoke = arguments.smoke
    device = torch.device("cpu" if smoke else "cuda")
    clock = Clock(device, quick=smoke)
    facts = environment(device)
    everyone = [*cases.ours(), *cases.eager_torch(), *peers.contenders()]
    if arguments.contenders:
        everyone = [c for c in everyone if any(word in c.name for word in arguments.contenders)]
    checked = accuracy.check(everyone, device, smoke=smoke, failures=FAILURES, reason=reason)
    run = Run(clock=clock, limits=clock.limits(), deadline=began + arguments.budget_s)
    compare(run, everyone, [case for case in shapes(smoke=smoke) if case.family in arguments.only], smoke=smoke)
    results = {
        "environment": facts,
        "limits": asdict(run.limits),
        "accuracy": checked,
        "rows": run.rows,
        "goals": goals.judge(run.rows, run.limits),
        "skipped": run.skipped,
        "left_out": run.left_out,
        "seconds": time.monotonic() - began,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder = arguments.out or Path(__file__).parent / "results" / slug
    report.write(folder, results)
    print((folder / "results.md").read_text())
    failed = [row for row in checked if row["ours"] and not row["passed"]]
    failed += [row for row in run.rows if row["ours"] and "failed" in row]
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
