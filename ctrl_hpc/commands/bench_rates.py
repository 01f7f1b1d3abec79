"""``ctrl-hpc bench rates``: what the machines of this site do in a second, for the plan (``plan.rates=FILE``)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from ctrl_hpc import jsonl
from ctrl_hpc.commands.output import check_file, place
from ctrl_hpc.plan.rates import UNITS, read

_DISK_BYTES = 256 << 20
_TESTS = 10
"""Of a program that the executor's rate is measured with."""
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 32, 128, 64


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--out", type=place, required=True, help="file of rates; what it holds of others stays")
    parser.add_argument("--only", nargs="+", choices=sorted(_MEASURED), default=None, help="of these alone")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the executor (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk of the runs (default: this folder)")
    parser.add_argument("--model", default=None, help="folder of the critic, for rollout_tokens_per_s, trainer_tflops")
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    check_file(options.out, "--out")
    found = read(options.out) if options.out.exists() else {}
    wanted = options.only or sorted(_MEASURED)
    missing = sorted(set(wanted) & _OF_MODEL)
    if missing and options.model is None and options.only:
        raise ValueError(f"--model: needed for {', '.join(missing)}")
    for name in wanted:
        if name in _OF_MODEL and options.model is None:
            continue
        found[name] = _MEASURED[name](options)
        Console().print(f"{name}: {found[name]:.4g} {UNITS[name]}", highlight=False)
        jsonl.write_text(options.out, json.dumps(found, indent=1) + "\n")
    return 0


def _executor(options: argparse.Namespace) -> float:
    """Tests a second of one jail: short programs, each another one."""
    from ctrl_hpc.records import Limits, StdinTest
    from ctrl_hpc.sandbox import Sandbox

    tests = [StdinTest(stdin=f"{n}\n", expected_stdout=f"{n}\n") for n in range(_TESTS)]
    numbers = itertools.count()

    def programs(count: int) -> Iterator[str]:
        return (f"print(input())  # {next(numbers)}" for _ in range(count))

    with Sandbox(workers=1) as sandbox:
        run = 0
        sandbox.run_many([(program, tests, Limits()) for program in programs(2)])
        began = time.perf_counter()
        while (spent := time.perf_counter() - began) < options.seconds:
            verdicts = sandbox.run_many([(program, tests, Limits()) for program in programs(5)])
            if not all(verdict.accepted for verdict in verdicts):
                raise RuntimeError(f"a right program was not accepted: {verdicts[0].status}")
            run += 5 * _TESTS
    return run / spent


def _disk(options: argparse.Namespace) -> float:
    """GB a second of one writer, until the bytes are on the disk."""
    if not options.folder.is_dir():
        raise ValueError(f"--folder: {options.folder} is no folder")
    data = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=options.folder, prefix=".ctrl-hpc-bench-") as file:
        began = time.perf_counter()
        for _ in range(_DISK_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _DISK_BYTES / 1e9 / (time.perf_counter() - began)


def _rollout(options: argparse.Namespace) -> float:
    """Tokens a second of the built-in server's engine on this machine."""
    import torch

    from ctrl_hpc.records import Sampling
    from ctrl_hpc.rollout.engine import load_engine

    engine = load_engine(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = [[1 + (n + at) % 100 for at in range(_PROMPT_TOKENS)] for n in range(_PROMPTS)]
    sampling = [Sampling(temperature=1.0, max_tokens=_NEW_TOKENS, seed=n) for n in range(_PROMPTS)]
    engine.generate(prompts[:2], sampling[:2])
    began = time.perf_counter()
    made = engine.generate(prompts, sampling)
    return sum(len(item.token_ids) for item in made) / (time.perf_counter() - began)


def _trainer(options: argparse.Namespace) -> float:
    """Useful Tflop/s of an RL update, on random weights of the critic's sizes."""
    from ctrl_hpc.train.measure import Options, bench

    return float(bench(Options(model=options.model))["rl"]["tflops"])


_MEASURED: dict[str, Callable[[argparse.Namespace], float]] = {
    "executor_tests_per_s": _executor,
    "disk_gb_per_s": _disk,
    "rollout_tokens_per_s": _rollout,
    "trainer_tflops": _trainer,
}
_OF_MODEL = {"rollout_tokens_per_s", "trainer_tflops"}
