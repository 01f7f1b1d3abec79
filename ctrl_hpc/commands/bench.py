"""``ctrl-hpc bench``: measurements of this machine, and of a simulated one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each thing that is measured."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    executor = kinds.add_parser("executor", help="speed of the executor against bare Python")
    executor.add_argument("--seconds", type=float, default=10.0, help="seconds a row (default: 10)")
    executor.add_argument("--beside", metavar="URL", help="another server of SandboxFusion's routes, measured too")
    soak = kinds.add_parser("soak", help="many runs of the executor, one in seven misbehaving")
    soak.add_argument("--runs", type=int, default=100_000, help="runs (default: 100000)")
    for what, kind in (("executor", executor), ("soak", soak)):
        kind.add_argument("--workers", type=int, default=2)
        kind.set_defaults(command=_bench, what=what)
    trainer = kinds.add_parser("trainer", help="memory beside the plan's estimate, tokens/s, MFU; random weights")
    trainer.add_argument("--model", default="200M", help="200M, a known model's name or a folder (default: 200M)")
    trainer.add_argument("--tokens", type=int, default=1024, help="of a micro-batch (default: 1024)")
    trainer.add_argument("--micro-batches", type=int, default=1, help="a step (default: 1)")
    trainer.add_argument("--steps", type=int, default=1, help="steps timed; 0: memory alone (default: 1)")
    trainer.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    trainer.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    trainer.add_argument("--peak-tflops", type=float, default=None, help="the device's bf16 peak, for MFU")
    trainer.add_argument("--out", type=Path, default=None, help="file for the numbers, as JSON")
    trainer.set_defaults(command=_bench_trainer)
    overlap = kinds.add_parser("overlap", help="how long the trainer of a simulated 8-node run waits for rollouts")
    overlap.add_argument("--trace", type=Path, default=None, help="recorded service times (default: the shipped ones)")
    overlap.add_argument("--record", type=Path, default=None, metavar="RUN", help="write --trace from this run first")
    overlap.add_argument("--note", default="", help="with --record: under which load the run was made, say")
    overlap.add_argument("--steps", type=int, default=100, help="steps simulated (default: 100)")
    overlap.add_argument(
        "--max-staleness", type=int, nargs="+", default=[0, 1, 2], metavar="K", help="(default: 0 1 2)"
    )
    overlap.add_argument("--executors", type=int, default=512, help="programs that run at once (default: 512)")
    overlap.add_argument(
        "--servers", type=int, default=24, help="of the critic, and as many of the generator (default: 24)"
    )
    overlap.add_argument("--chunk", type=int, default=0, help="drafts of a chunk, as rl.chunk (default: 0, a step's)")
    overlap.add_argument("--chunks-in-flight", type=int, default=8, help="as rl.chunks_in_flight (default: 8)")
    overlap.add_argument("--out", type=Path, default=Path("overlap.png"), help="the plot (default: overlap.png)")
    overlap.set_defaults(command=_bench_overlap)


def _bench(options: argparse.Namespace) -> int:
    from ctrl_hpc.sandbox import bench, soak

    if options.what == "soak":
        return 0 if soak.bench(options.runs, options.workers) else 1
    bench.bench(workers=options.workers, seconds=options.seconds, beside=options.beside)
    return 0


def _bench_overlap(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster import simulation

    if options.record is not None:
        if options.trace is None:
            raise ValueError("--record: --trace names the file to write")
        options.trace.write_text(json.dumps(simulation.record(options.record, options.note), separators=(",", ":")))
    trace = simulation.load(options.trace or simulation.TRACE)
    layout = simulation.Layout(
        executors=options.executors,
        critic_servers=options.servers,
        generator_servers=options.servers,
        chunk=options.chunk,
        chunks_in_flight=options.chunks_in_flight,
    )
    stales = dict.fromkeys(options.max_staleness)
    results = [simulation.simulate(trace, layout, max_staleness=stale, steps=options.steps) for stale in stales]
    print(f"service times of {trace['provenance']}; {layout}")
    for result in results:
        work = f"the trainer works {result.trainer_s:.3f} s, writes weights {result.publish_s:.3f} s"
        waits = f"waits for rollouts {100 * result.fraction:.1f} % of the time"
        rollouts = f"rollouts take {result.rollouts_s:.3f} s and are {result.staleness:.2f} versions old"
        print(f"max_staleness={result.max_staleness}: a step takes {result.step_s:.3f} s; {work}, {waits}; {rollouts}")
    simulation.plot(results, options.out, trace["provenance"])
    print(options.out)
    return 0


def _bench_trainer(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from ctrl_hpc.plan.measure import Options, bench

    bench(Options(**{field.name: getattr(options, field.name) for field in fields(Options)}), options.out)
    return 0
