"""``ctrl-hpc serve``: one service by hand, an executor, a rollout server or a critic that judges."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctrl_hpc.commands.output import place


def add(parser: argparse.ArgumentParser) -> None:
    """The kinds of services, and their arguments."""
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    executor = kinds.add_parser("executor", help="SandboxFusion's routes over nsjail workers")
    executor.add_argument("--workers", type=_positive, default=2, help="jails; about one a core")
    executor.add_argument("--cache", type=place, default=None, help="folder of the verdict cache (default: none)")
    executor.add_argument(
        "--max-waiting", type=_positive, default=1024, help="executions that may wait (default: 1024)"
    )
    executor.add_argument("--max-body-mb", type=_positive, default=256, help="largest request (default: 256)")
    executor.add_argument(
        "--judge", action="append", default=[], type=_pair, metavar="NAME=FILE.py:FUNCTION", help="special judge"
    )
    executor.add_argument("--python", default="", help="interpreter that programs run with (default: this one)")
    executor.add_argument("--testlib", default="", metavar="FILE", help="testlib.h, for problems with a checker")
    executor.add_argument("--packages", default="numpy", help="its packages that programs may import (default: numpy)")
    executor.set_defaults(command=_executor)
    rollout = kinds.add_parser("rollout", help="SGLang's and OpenAI's routes over a Hugging Face model")
    rollout.add_argument("--model", required=True, help="Hugging Face folder")
    rollout.add_argument("--threads", type=_positive, default=2, help="CPU threads")
    rollout.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    rollout.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the weights' own where it pays"
    )
    rollout.add_argument("--batching", choices=["auto", "padded", "continuous"], default="auto")
    rollout.add_argument(
        "--max-batch-tokens", type=_positive, default=65536, help="largest padded batch (default: 65536)"
    )
    rollout.set_defaults(command=_rollout)
    judge = kinds.add_parser("judge", help="critiques, and the probability that a program is right")
    _judge_arguments(judge)
    for kind in (executor, rollout, judge):
        kind.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
        kind.add_argument("--token-env", default=None, help="environment variable with the bearer token to ask for")
        kind.add_argument("--port", type=int, required=True, help="port; 0: any free one")


def _judge_arguments(judge: argparse.ArgumentParser) -> None:
    judge.add_argument("--model", required=True, help="the critic: Hugging Face folder, or URL#MODEL of an endpoint")
    judge.add_argument("--prompts", default="default", help="its templates: default, ctrl, tiny or a folder")
    judge.add_argument("--critique-prefix", default="", metavar="TEXT", help="what every critique begins with")
    judge.add_argument(
        "--critique-close", default="", metavar="TEXT", help="what a critique without a judgement is continued after"
    )
    judge.add_argument("--calibration", type=Path, default=None, metavar="FILE", help="made by ctrl-hpc calibrate")
    judge.add_argument("--cache", type=place, default=None, help="folder of answers kept for later (default: none)")
    judge.add_argument("--threads", type=_positive, default=2, help="CPU threads")
    judge.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    judge.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    judge.add_argument(
        "--batching", choices=["padded", "continuous"], default="padded", help="continuous: no token probabilities"
    )
    judge.add_argument(
        "--max-batch-tokens", type=_positive, default=65536, help="largest padded batch (default: 65536)"
    )
    judge.set_defaults(command=_judge)


def _pair(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE.py:FUNCTION")
    return name, place


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; it must be greater than 0")
    return number


_positive.__name__ = "int"  # argparse names the type of what is no number by it


def _executor(options: argparse.Namespace) -> int:
    from ctrl_hpc.sandbox.server import serve

    with _token(options) as access, _keys_as_options():
        serve(
            host=options.host,
            port=options.port,
            workers=options.workers,
            cache_dir=options.cache,
            **access,
            judges=dict(options.judge),
            python=options.python,
            packages=[name for name in options.packages.split(",") if name],
            testlib=options.testlib,
            max_waiting=options.max_waiting,
            max_body_bytes=options.max_body_mb << 20,
        )
    return 0


@contextlib.contextmanager
def _keys_as_options() -> Iterator[None]:
    """What the executor says of a configuration's keys is said of the options that stand for them here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"\bexecutor\.(?=python|packages|testlib)", "--", str(error))) from None


def _rollout(options: argparse.Namespace) -> int:
    from ctrl_hpc.config.machine import resolve_device
    from ctrl_hpc.rollout.server import serve

    with _token(options) as access:
        serve(
            options.model,
            host=options.host,
            port=options.port,
            threads=options.threads,
            device=resolve_device("--device", options.device),
            dtype=options.dtype,
            batching=options.batching,
            max_batch_tokens=options.max_batch_tokens,
            **access,
        )
    return 0


def _judge(options: argparse.Namespace) -> int:
    from ctrl_hpc.config.machine import resolve_device
    from ctrl_hpc.judge.server import Options, serve

    asked = Options(
        model=options.model,
        prompts=options.prompts,
        critique_prefix=options.critique_prefix,
        critique_close=options.critique_close,
        calibration=options.calibration,
        cache=None if options.cache is None else Path(options.cache),
        threads=options.threads,
        device=resolve_device("--device", options.device),
        dtype=options.dtype,
        batching=options.batching,
        max_batch_tokens=options.max_batch_tokens,
    )
    with _token(options) as access:
        serve(asked, host=options.host, port=options.port, **access)
    return 0


@contextlib.contextmanager
def _token(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Who may ask: whoever has the token in the variable named, or, on loopback, in a file that is made for it.

    That file is named once the service answers, so that a wrong argument is told in one line.
    """
    from ctrl_hpc.service import http

    variable = options.token_env
    if variable:
        token = os.environ.get(variable)
        if not token:
            raise ValueError(f"--token-env: the environment variable {variable} is not set")
        yield {"token": token, "on_ready": _say}
        return
    http.access(options.host, None)
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-serve-") as folder:
        file = Path(folder) / "token"

        def ready(url: str) -> None:
            print(f"this user's programs may ask; others need the bearer token in {file}", file=sys.stderr, flush=True)
            _say(url)

        yield {"token": http.token_in(file), "own_user": True, "on_ready": ready}


def _say(url: str) -> None:
    print(f"listening on {url}", flush=True)
