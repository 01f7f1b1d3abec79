"""What the trainer takes and does on this machine, with random weights: memory beside the plan's, tokens/s, MFU.

The rates are those to set as ``plan.trainer_tflops``. Measured in a process of its own (``measurement``), so that
nothing else counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ctrl_hpc import jsonl
from ctrl_hpc.train.plan import count

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "200M"
    """``200M``, a known model's name (``configs/models.json``) or a folder with a config.json."""
    tokens: int = 1024
    """Of a micro-batch."""
    micro_batches: int = 1
    """A step."""
    steps: int = 1
    """Steps timed, after one that is not; 0 measures memory alone."""
    threads: int = 2
    """CPU threads."""
    recompute: str = "none"
    """``parallel.recompute``."""
    peak_tflops: float | None = None
    """The device's dense bf16 peak, for MFU; None: an H100's or H200's 989 on a GPU, none on a CPU."""


def bench(options: Options, out: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, write ``out`` as JSON.

    Raises ValueError for an unknown model, RuntimeError with the child's last line when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-bench-") as folder:
        for work in ("write", "measure"):
            command = [sys.executable, "-m", "ctrl_hpc.train.measurement", work, folder, json.dumps(asdict(options))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
                raise (ValueError if last.startswith("ValueError: ") else RuntimeError)(last.partition(": ")[2] or last)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    _show(found)
    if out is not None:
        jsonl.write_text(out, json.dumps(found, indent=1) + "\n")
    return found


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['model']}, {count(found['parameters'])} parameters, on {found['device']}")
    for column in ("memory", "GiB"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for kind, size in found["planned"].items():
        table.add_row(f"planned: {kind}", f"{size / GIB:.2f}")
    table.add_row("planned", f"{found['planned_bytes'] / GIB:.2f}")
    table.add_row("measured", f"{found['measured_bytes'] / GIB:.2f}")
    table.add_row("planned / measured", f"{found['planned_bytes'] / found['measured_bytes']:.3f}")
    console = Console()
    console.print(table)
    for stage in ("sft", "rl"):
        if stage in found:
            rate = found[stage]
            mfu = "" if rate["mfu"] is None else f", MFU {100 * rate['mfu']:.1f} %"
            console.print(f"{stage} update: {rate['tokens_per_s']:.0f} tokens/s, {rate['tflops']:.3g} Tflop/s{mfu}")
    console.print(f"kernels: {found['kernels']}")
