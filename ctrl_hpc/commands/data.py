"""``ctrl-hpc data``: a data set in our schema, what it holds beside what the paper says, and what decontamination took.

``ctrl-hpc data NAME`` takes a data set by name, ``ctrl-hpc data CONFIG.yaml`` the training problems of a configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_hpc.commands.output import check_file, place
from ctrl_hpc.commands.parser import add_overrides

_PROVENANCE = ".provenance.json"
"""Ending of the file beside one that was written: counts, sources, and what was left out."""

if TYPE_CHECKING:
    from ctrl_hpc.config.machine import ExecutorConfig
    from ctrl_hpc.data.table import Keep


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("target", metavar="NAME|CONFIG.yaml", help="a data set, or a configuration for its own")
    add_overrides(parser, help="with a configuration")
    parser.add_argument("--path", default=None, help="file or folder with the data set (default: the hub)")
    parser.add_argument("--split", default=None, help="split (default: the data set's first)")
    parser.add_argument("--n", type=int, default=None, help="problems at most, the first ones (default: all)")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="leave out problems that are like those of this benchmark; may be given several times",
    )
    parser.add_argument("--out", type=place, default=None, help="file to write (default: standard output)")
    parser.add_argument(
        "--verify",
        type=place,
        default=None,
        metavar="LEDGER.json",
        help="run every canonical solution and every known-wrong program; with a configuration --out gets what "
        "data.verified_only leaves",
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="programs that --verify runs at once (default: cores)"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Load, decontaminate, verify, write, and tell on stderr; beside ``--out FILE`` goes FILE.provenance.json."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers: {options.workers} is not allowed; it must be greater than 0")
    _check_outputs(options)
    from ctrl_hpc.data import problems
    from ctrl_hpc.store.tests import TestStore

    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-tests-") as place, TestStore(Path(place)) as tests:
        keep = partial(problems.kept, tests=tests)
        if options.target.endswith((".yaml", ".yml")):
            items, facts, executor, verified_only = _configured(options, keep)
        else:
            items, facts = _named(options, keep)
            executor, verified_only = _default_executor(), False
        if options.verify is not None:
            items = _verify(options, items, executor, verified_only)
        _write(options.out, items, facts)
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    sources = [options.path, *(text.partition("=")[2] for text in options.against), options.target]
    sources += [text.partition("=")[2] for text in options.overrides]
    if options.out is not None:
        check_file(options.out, "--out", inputs=sources, beside=_PROVENANCE)
    if options.verify is not None:
        check_file(options.verify, "--verify", inputs=[*sources, options.out])


def _default_executor() -> ExecutorConfig:
    from ctrl_hpc.config.machine import ExecutorConfig

    return ExecutorConfig()


def _verify(
    options: argparse.Namespace, items: Sequence[Any], settings: ExecutorConfig, verified_only: bool | None
) -> Sequence[Any]:
    """Write the ledger; the items that ``data.verified_only`` leaves. What was found is kept beside it until then."""
    from ctrl_hpc import jsonl
    from ctrl_hpc.data import verification
    from ctrl_hpc.records import Problem
    from ctrl_hpc.sandbox import Sandbox, judge

    if not all(isinstance(item, Problem) for item in items):
        raise ValueError("--verify: pairs of answers hold no programs to run")
    journal = options.verify.with_name(options.verify.name + ".part")
    workers = options.workers or os.cpu_count() or 1
    judges = judge.load(settings.judges)
    with Sandbox(
        workers, judges=judges, python=settings.python, packages=settings.packages, testlib=settings.testlib
    ) as sandbox:
        ledger = verification.verify(items, sandbox, settings, journal)
    jsonl.write_text(options.verify, json.dumps(ledger.encode(), indent=1) + "\n")
    for line in ledger.lines():
        print(line, file=sys.stderr)
    return items if verified_only is False else verification.proven(items, ledger, strictly=bool(verified_only))


def _configured(
    options: argparse.Namespace, keep: Keep
) -> tuple[Sequence[Any], dict[str, Any], ExecutorConfig, bool | None]:
    from ctrl_hpc.config import load
    from ctrl_hpc.data import catalog, inventory

    if options.path or options.split or options.n is not None or options.against:
        raise ValueError(
            "--path, --split, --n and --against go with the name of a data set; with a configuration: data.*"
        )
    config = load(options.target, options.overrides)
    found = catalog.prepared(config.data, config.seed, critic=config.critic.model, keep=keep)
    facts = inventory.describe(config.data.name, config.data.split, found.problems) | catalog.facts(found)
    return found.problems, facts, config.executor, config.data.verified_only


def _named(options: argparse.Namespace, keep: Keep) -> tuple[Sequence[Any], dict[str, Any]]:
    from ctrl_hpc import jsonl
    from ctrl_hpc.data import catalog, inventory, judgebench

    if options.overrides:
        raise ValueError(
            f"{options.overrides[0]!r}: overrides go with a configuration, not with the name of a data set"
        )
    name = options.target
    if options.n is not None and options.n < 1:
        raise ValueError(f"--n: {options.n} is not allowed; it must be greater than 0")
    if name == "judgebench":
        split = options.split or "gpt"
        pairs = judgebench.load(options.path, split)
        return pairs[: options.n], inventory.describe(name, split, pairs) | {"decontamination": None}
    split = options.split or catalog.default_split(name)
    loaded = catalog.read(name, options.path, split, keep=keep)
    catalog.tell(name, loaded.left_out)
    problems = loaded.items
    facts = inventory.describe(name, split, problems) | {"left_out": list(map(jsonl.encode, loaded.left_out))}
    left_out = None
    if options.against:
        against = {}
        for text in options.against:
            benchmark, _, path = text.partition("=")
            against[benchmark] = catalog.whole(benchmark, path or None, "test", keep=keep)
        problems, left_out = catalog.without_benchmarks(problems, against)
    return problems[: options.n], facts | {"decontamination": left_out}


def _write(out: Path | None, items: Sequence[Any], facts: dict[str, Any]) -> None:
    from ctrl_hpc import jsonl
    from ctrl_hpc.data import inventory
    from ctrl_hpc.records import Problem

    for line in inventory.lines(facts):
        print(line, file=sys.stderr)
    if facts["decontamination"] is not None:
        print(facts["decontamination"]["text"], file=sys.stderr)
    whole = (replace(item, tests=tuple(item.tests)) if isinstance(item, Problem) else item for item in items)
    if out is None:
        sys.stdout.writelines(map(jsonl.line, whole))
        return
    jsonl.write(out, whole)
    beside = out.with_name(out.name + _PROVENANCE)
    jsonl.write_text(beside, json.dumps(facts | {"written": len(items)}, indent=1) + "\n")
    print(f"{out}: {len(items)} problems; {beside}: counts, sources, and what was left out")
