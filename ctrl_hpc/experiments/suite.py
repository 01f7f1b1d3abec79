"""``ctrl-hpc suite``: many runs by one file, one report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config, load
from ctrl_hpc.config.changes import depends, reads
from ctrl_hpc.config.load import find, no_such
from ctrl_hpc.progress import console
from ctrl_hpc.run import directory, journal
from ctrl_hpc.store.tests import folder_of
from ctrl_hpc.tracking import marks


def read_yaml(path: Path, what: str) -> Any:
    """What a file holds; raises ValueError with one line where there is no such ``what``, or it is not YAML."""
    if not path.is_file():
        raise ValueError(no_such(path, f"{what} file", what))
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


SHARED = ("sample", "synthesize", "sft")
"""Stages that a member takes over from another which agrees in all that they depend on."""
_UNTRAINED = ("base", "sft", "exec_feedback", "self_exec_feedback", "oracle")
"""Critics whose evaluation does not depend on stage II."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One experiment of a suite, for each of its seeds."""

    name: str
    config: str | None = None
    """Configuration, relative to the suite's file; None: the suite's."""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    """None: the suite's."""
    note: str | None = None
    """What it is for: the table or figure it fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite's file."""

    name: str
    variants: tuple[Variant, ...]
    config: str | None = None
    """Configuration of variants that name none, relative to the suite's file."""
    folder: str | None = None
    """Folder of the members' run directories and of ``report/``; None: ``runs/NAME``."""
    overrides: tuple[str, ...] = ()
    """Overrides of every variant, before its own."""
    seeds: tuple[int, ...] = (0,)
    share: bool = True
    """Take over stages that another member has done with the same configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One run of a suite."""

    variant: Variant
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir or "")

    @property
    def done(self) -> bool:
        """Whether all its stages are."""
        return all(directory.is_done(self.folder, stage) for stage in self.config.stages)


def read(file: str | Path) -> Suite:
    """A suite's file; raises ValueError with one line for what is wrong in it."""
    path = find(file, "suite")
    data = read_yaml(path, "suite")
    try:
        suite: Suite = jsonl.decode(Suite, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [variant.name for variant in suite.variants]
    for name in names:
        if not name or "/" in name or names.count(name) > 1:
            raise ValueError(f"{path}: variants: {name!r} is not allowed; names are given once and have no slash")
    if not names:
        raise ValueError(f"{path}: variants: none; a suite names at least one")
    return suite


def members(suite: Suite, file: str | Path, overrides: Sequence[str] = ()) -> list[Member]:
    """Every run of a suite, by seed and variant, so that variants of one seed follow each other.

    Raises ValueError naming the variant whose configuration is wrong.
    """
    here = find(file, "suite").resolve().parent
    folder = Path(suite.folder or Path("runs") / suite.name).expanduser().absolute()
    out = []
    for variant in suite.variants:
        config = variant.config or suite.config
        if config is None:
            raise ValueError(f"{file}: variants: {variant.name}: config: missing, and the suite has none")
        for seed in variant.seeds if variant.seeds is not None else suite.seeds:
            place = f"run_dir={folder / f'{variant.name}-seed{seed}'}"
            own = [*suite.overrides, *variant.overrides, *overrides, f"seed={seed}", place]
            try:
                loaded = load(here / config, [*own, f"wandb.group={suite.name}"])
            except ValueError as error:
                raise ValueError(f"{file}: variants: {variant.name}: {error}") from None
            out.append(Member(variant=variant, seed=seed, config=loaded))
    return sorted(out, key=lambda member: member.seed)


def check(wanted: Sequence[Member], *, dry: bool = False) -> list[str]:
    """Look at every member that is not done before the first of them starts.

    With ``dry``, returns what this machine lacks, each once. Raises ValueError naming the member and what is wrong.
    """
    from ctrl_hpc import preflight

    lacking: dict[str, None] = {}
    for member in wanted:
        if member.done:
            continue
        for finding in preflight.findings(member.config):
            if not (dry and finding.here):
                raise ValueError(f"{member.folder.name}: {finding.text}")
            lacking[finding.text] = None
    return list(lacking)


def run(file: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Path:
    """Run what is not done, then report all that is; returns the report's folder.

    A member that fails does not stop the others. Raises RuntimeError naming those that failed.
    """
    suite = read(file)
    every = members(suite, file, overrides)
    wanted = _chosen(every, only)
    check(wanted)
    failed = [member.folder.name for member, error in run_members(suite.name, wanted, every, suite.share) if error]
    finished = [member for member in every if member.done and "report" in member.config.stages]
    out = Path(suite.folder or Path("runs") / suite.name).expanduser().absolute() / "report"
    if finished:
        from ctrl_hpc.report import combined

        combined.write([member.folder for member in finished], out, suite.name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} runs failed: {', '.join(failed)}; the same command goes on")
    return out


def run_members(
    name: str, wanted: Sequence[Member], every: Sequence[Member], share: bool
) -> Iterator[tuple[Member, str | None]]:
    """Run the wanted members that are not done, in order; yields each member when it is done, or why it failed."""
    started = time.monotonic()
    n_todo, n_run = sum(not member.done for member in wanted), 0
    for member in wanted:
        failure = None
        if not member.done:
            left = _time_left(time.monotonic() - started, n_run, n_todo)
            n_run += 1
            console.rule(f"[bold]{name} {n_run}/{n_todo}: {member.folder.name}{left}")
            try:
                _run_member(member, every if share else [])
            except (ValueError, RuntimeError, OSError) as error:
                failure = str(error)
                console.print(f"{member.folder.name}: {error}", style="red", highlight=False)
        yield member, failure


def _chosen(every: Sequence[Member], only: Sequence[str]) -> list[Member]:
    names = list(dict.fromkeys(member.variant.name for member in every))
    for name in only:
        if name not in names:
            raise ValueError(f"--only: {name!r} is not a variant; allowed: {', '.join(names)}")
    return [member for member in every if not only or member.variant.name in only]


def _time_left(spent_s: float, done: int, total: int) -> str:
    return f", about {spent_s / done * (total - done) / 60:.0f} min left" if done else ""


def _run_member(member: Member, others: Sequence[Member]) -> None:
    from ctrl_hpc import pipeline

    directory.prepare(member.config)
    for stage in SHARED:
        donor = _donor(member, others, stage)
        if donor is not None and stage in member.config.stages:
            take_over(donor.folder, member.folder, stage)
            console.print(f"{stage}: taken over from {donor.folder.name}")
    _share_evaluation(member, others)
    pipeline.run(member.config)


def _donor(member: Member, others: Sequence[Member], stage: str) -> Member | None:
    """A member that has done a stage which this one has not, and agrees in all that the stage depends on."""
    if directory.is_done(member.folder, stage):
        return None
    others = [other for other in others if other.folder != member.folder and directory.is_done(other.folder, stage)]
    return next((other for other in others if _agree(other, member, lambda config: depends(stage, config))), None)


def _agree(one: Member, other: Member, keys: Callable[[Config], set[str]]) -> bool:
    """Whether two members have the same values under keys that depend on their configurations."""
    return not directory.differences(one.config, other.config, keys(one.config) | keys(other.config))


def take_over(source: Path, target: Path, stage: str) -> None:
    """A stage's records and, with them, the training problems and models they belong to, as hard links."""
    for name in ("models", stage):
        if (source / name).is_dir() and not (target / name / "done.json").exists():
            _link(source / name, target / name)
    if stage in journal.STAGES:
        marks.leave_out(target, stage)
    (target / "problems").mkdir(exist_ok=True)
    for file in (source / "problems").iterdir():
        if not file.name.startswith("eval-") and not (target / "problems" / file.name).exists():
            os.link(file, target / "problems" / file.name)
    tests = folder_of(source)
    if tests.is_dir():
        folder_of(target).mkdir(exist_ok=True)
        for file in sorted(tests.iterdir()):
            if not (folder_of(target) / file.name).exists():
                os.link(file, folder_of(target) / file.name)


def _link(source: Path, target: Path) -> None:
    """Link a folder whole, or not at all when killed; what a folder of the same name held is replaced."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, copy_function=os.link)
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)


def _share_evaluation(member: Member, others: Sequence[Member]) -> None:
    """The drafts and the turns of critics that stage II does not touch, from a member that has evaluated them."""
    if directory.is_done(member.folder, "eval") or not directory.is_done(member.folder, "sft"):
        return
    for other in others:
        agree = _agree(other, member, lambda config: reads("eval", config) | depends("sft", config))
        if other.folder != member.folder and agree and directory.is_done(other.folder, "eval"):
            for dataset in member.config.data.eval_names:
                _share_dataset(other.folder / "eval" / dataset, member.folder / "eval" / dataset)
            console.print(f"eval: drafts and untrained critics taken over from {other.folder.name}")
            return


def _share_dataset(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        place = target / entry.name
        if place.exists():
            continue
        if entry.is_dir() and entry.name.removesuffix("_greedy") in _UNTRAINED:
            _link(entry, place)
        elif entry.is_file() and entry.name.startswith("drafts"):
            os.link(entry, place)


def plan_table(suite: Suite, every: Sequence[Member]) -> Table:
    """What a suite would run."""
    table = Table("run", "configuration", "overrides", "state", "for", title=f"{suite.name}: {len(every)} runs")
    for member in every:
        variant = member.variant
        state = "done" if member.done else "begun" if member.folder.exists() else "to do"
        cells = (member.folder.name, variant.config or suite.config or "", " ".join(variant.overrides), state)
        table.add_row(*(escape(cell) for cell in (*cells, variant.note or "")))
    return table
