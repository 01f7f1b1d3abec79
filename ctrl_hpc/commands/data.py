"""``ctrl-hpc data``: a data set in our schema, what it holds beside what the paper says, and what decontamination took.

``ctrl-hpc data NAME`` takes a data set by name, ``ctrl-hpc data CONFIG.yaml`` the training problems of a configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("target", metavar="NAME|CONFIG.yaml", help="a data set, or a configuration for its own")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="with a configuration")
    parser.add_argument("--path", default=None, help="file or folder with the data set (default: the hub)")
    parser.add_argument("--split", default=None, help="split (default: test; train where there is one to train on)")
    parser.add_argument("--n", type=int, default=None, help="problems at most, the first ones (default: all)")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="leave out problems that are like those of this benchmark; may be given several times",
    )
    parser.add_argument("--out", type=Path, default=None, help="file to write (default: standard output)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Load, decontaminate, write, and tell on stderr; beside ``--out FILE`` goes FILE.provenance.json."""
    if options.target.endswith((".yaml", ".yml")):
        items, facts = _configured(options)
    else:
        items, facts = _named(options)
    _write(options.out, items, facts)
    return 0


def _configured(options: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    from ctrl_hpc.config import load
    from ctrl_hpc.data import catalog, inventory

    if options.path or options.split or options.n is not None or options.against:
        raise ValueError(
            "--path, --split, --n and --against go with the name of a data set; with a configuration: data.*"
        )
    config = load(options.target, options.overrides)
    problems, left_out = catalog.training(config.data, config.seed)
    return problems, inventory.describe(config.data.name, config.data.split, problems) | {"decontamination": left_out}


def _named(options: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
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
    split = options.split or ("train" if name in ("taco", "jsonl", "tiny") else "test")
    problems = catalog.whole(name, options.path, split)
    facts = inventory.describe(name, split, problems)
    left_out = None
    if options.against:
        against = {}
        for text in options.against:
            benchmark, _, path = text.partition("=")
            against[benchmark] = catalog.whole(benchmark, path or None, "test")
        problems, left_out = catalog.without_benchmarks(problems, against)
    return problems[: options.n], facts | {"decontamination": left_out}


def _write(out: Path | None, items: Sequence[Any], facts: dict[str, Any]) -> None:
    from ctrl_hpc import jsonl
    from ctrl_hpc.data import inventory

    for line in inventory.lines(facts):
        print(line, file=sys.stderr)
    if facts["decontamination"] is not None:
        print(facts["decontamination"]["text"], file=sys.stderr)
    if out is None:
        sys.stdout.writelines(map(jsonl.line, items))
        return
    jsonl.write(out, items)
    beside = out.with_name(out.name + ".provenance.json")
    jsonl.write_text(beside, json.dumps(facts | {"written": len(items)}, indent=1) + "\n")
    print(f"{out}: {len(items)} problems; {beside}: counts, sources, and what was left out")
