"""``ctrl-hpc track`` and ``timeline``: a run's journals for other programs that show them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ctrl_hpc.commands.output import check_file, place
from ctrl_hpc.commands.status import fold

_WRITERS = ("tensorboard", "mlflow")


def add(commands: Any) -> None:
    """What shows the journals of a run elsewhere."""
    track = commands.add_parser("track", help="tell TensorBoard or MLflow what it lacks of a run")
    track.add_argument("run_dir", metavar="RUN", help="run directory")
    track.add_argument("writer", choices=_WRITERS, help="who is told; needs its package")
    track.set_defaults(command=_track)
    timeline = commands.add_parser(
        "timeline", help="who waited for whom: a Chrome trace of a run, for ui.perfetto.dev or chrome://tracing"
    )
    timeline.add_argument("run_dir", metavar="RUN", help="run directory")
    timeline.add_argument("--out", metavar="FILE", default=None, help="(default: RUN/report/timeline.json)")
    timeline.set_defaults(command=_timeline)


def _track(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster.status import run_folder
    from ctrl_hpc.config import load
    from ctrl_hpc.tracking.writers import track

    folder = run_folder(options.run_dir)
    count = track(load(folder / "config.yaml"), folder, options.writer)
    print(f"{options.writer}: {count} lines told")
    return 0


def _timeline(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ctrl_hpc import jsonl
    from ctrl_hpc.cluster.status import run_folder
    from ctrl_hpc.report import timeline

    folder = run_folder(options.run_dir)
    out = Path(options.run_dir).expanduser() / "report" / "timeline.json" if options.out is None else place(options.out)
    check_file(out, "--out", inputs=(folder / "config.yaml",))
    events = timeline.events(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.write_text(out, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    table = Table("stage", "what", "seconds", "share of the steps")
    for share in timeline.shares(folder):
        table.add_row(share.stage, share.what, f"{share.seconds:.1f}", f"{100 * share.share:.0f} %")
    Console().print(fold(table))
    print(f"timeline: {out} (open it in ui.perfetto.dev or chrome://tracing)")
    return 0
