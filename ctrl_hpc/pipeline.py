"""The pipeline: sample -> synthesize -> sft -> rl -> eval -> report, each stage resumable, its records on disk.

    problem -> solution -> execution -> hint -> critique -> revision -> execution -> reward -> advantage -> update

Every stage is a function of the run and of the connections to its services; the cluster only decides where they run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import ctrl_hpc.evaluate.run as evaluation
import ctrl_hpc.report.page as reporting
from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import Connections, connect, spent
from ctrl_hpc.cluster.prefork import Prefork
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.cluster.trainer import run_trainer
from ctrl_hpc.config import Config
from ctrl_hpc.config.stages import STAGES
from ctrl_hpc.data import catalog, critic_benchmarks, judgebench
from ctrl_hpc.data import problems as problems_of
from ctrl_hpc.data.table import Keep
from ctrl_hpc.data.verification import proven, verify
from ctrl_hpc.evaluate.benchmarked import questions_file
from ctrl_hpc.evaluate.critics import roles
from ctrl_hpc.evaluate.judgebench import pairs_file
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.adversarial import strengthen
from ctrl_hpc.flow.feedback import hint
from ctrl_hpc.flow.filters import counts, mend, select, traits
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique_with_hints, draft, execute
from ctrl_hpc.progress import Steps, console
from ctrl_hpc.records import Critique, Problem, Sampling, Solution
from ctrl_hpc.run import directory, disk
from ctrl_hpc.sandbox import rootfs
from ctrl_hpc.store.tests import TestStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A prepared run: its configuration, its folder, its problems and its prompts."""

    config: Config
    folder: Path
    tests: TestStore
    """The tests of its problems."""
    problems: tuple[Problem, ...]
    """Training problems; they name their tests, which are read when they are looked at."""
    eval_problems: dict[str, tuple[Problem, ...]]
    """Evaluation problems by data set."""
    prompts: Prompts
    prefork: Prefork | None = None
    """What the trainer's processes are forked from, on one machine."""

    def every_problem(self) -> list[Problem]:
        """Training and evaluation problems."""
        return [*self.problems, *(problem for items in self.eval_problems.values() for problem in items)]


def sample(run: Run, connections: Connections) -> dict[str, Any]:
    """Drafts of the fixed generator for every training problem, executed."""
    config = run.config
    sampling = Sampling(
        temperature=config.sample.temperature,
        max_tokens=config.sample.max_tokens,
        n=config.sample.n_samples,
        seed=config.seed,
    )
    facts = _prove(run, connections)
    problems_all = _before_strengthening(run)
    size = config.sample.chunk

    def work(problems: Sequence[Problem], number: int, log: WriteAheadLog) -> list[Solution]:
        seeded = replace(sampling, seed=config.seed * 1_000_003 + number * size)
        return evaluation.executed_drafts(
            problems,
            number,
            log,
            lambda: draft(problems, connections.generator, run.prompts, seeded),
            lambda pairs: execute(pairs, connections.executor, config.executor.rules),
        )

    file = run.folder / "sample" / "solutions.jsonl"
    as_drafted = file.with_name("drafts.jsonl") if config.sample.adversarial_tests else file
    with Steps("sample: drafts, executed", len(problems_all)) as steps:
        solutions = in_parts(
            as_drafted, Solution, problems_all, work, size=size, at_once=1, tell=lambda done, _: steps.reach(done)
        )
    if config.sample.adversarial_tests:
        solutions, added = _strengthen(run, problems_all, solutions, connections)
        facts["adversarial_tests"] = added
        jsonl.write(file, solutions)
        as_drafted.unlink(missing_ok=True)
    right = sum(solution.verdict is not None and solution.verdict.accepted for solution in solutions)
    return {"solutions": len(solutions), "pass_at_1": right / len(solutions), **facts, **spent(connections.generator)}


def _prove(run: Run, connections: Connections) -> dict[str, Any]:
    """Leave out training problems whose canonical solution fails (``data.verified_only``): ``problems/ledger.json``."""
    folder, strictly = run.folder / "problems", run.config.data.verified_only
    file = folder / "ledger.json"
    if strictly is False or not (strictly or any(problem.canonical_solution for problem in run.problems)):
        return {}
    if not file.exists():
        ledger = verify(run.problems, connections.executor, run.config.executor, folder / "ledger.json.part")
        kept = proven(run.problems, ledger, strictly=bool(strictly))
        console.print("\n".join(ledger.lines()), highlight=False)
        if not kept:
            reason = ledger.failed[0]
            raise ValueError(f"data.verified_only: no problem is left; {reason.id}: {reason.reason}")
        problems_of.write(folder / "train.jsonl", kept, run.tests)
        jsonl.write_text(file, json.dumps(ledger.encode(), indent=1) + "\n")
    told = json.loads(file.read_text())
    return {"verified": told["verified"], "unverified": len(told["failed"])}


def _before_strengthening(run: Run) -> Sequence[Problem]:
    """The training problems as they came; ``sample`` may have been killed after it had added tests."""
    original = run.folder / "problems" / "train-original.jsonl"
    file = original if original.exists() else original.with_name("train.jsonl")
    return list(problems_of.read(file, run.tests))


def _strengthen(
    run: Run, problems: Sequence[Problem], drafts: Sequence[Solution], connections: Connections
) -> tuple[list[Solution], int]:
    """Adversarial tests for the training problems, in ``problems/train.jsonl``; drafts executed anew, tests added."""
    config, folder = run.config, run.folder / "problems"
    stronger = strengthen(
        problems,
        drafts,
        connections.executor,
        config.executor.rules,
        n=config.sample.adversarial_tests,
        seed=config.seed,
    )
    problems_of.write(folder / "train-original.jsonl", problems, run.tests)
    problems_of.write(folder / "train.jsonl", stronger, run.tests)
    changed = {new.id: new for old, new in zip(problems, stronger, strict=True) if new is not old}
    todo = [(changed[item.problem_id], replace(item, verdict=None)) for item in drafts if item.problem_id in changed]
    again = {item.id: item for item in execute(todo, connections.executor, config.executor.rules)}
    return [again.get(item.id, item) for item in drafts], sum(len(new.tests) for new in stronger) - sum(
        len(old.tests) for old in problems
    )


def synthesize(run: Run, connections: Connections) -> dict[str, Any]:
    """Stage I's critiques: the base critic, shown an execution hint that it must not mention."""
    config = run.config
    by_id = {problem.id: problem for problem in problems_of.read(run.folder / "problems" / "train.jsonl", run.tests)}
    pairs = [(by_id[solution.problem_id], solution) for solution in _solutions(run)]
    sampling = Sampling(temperature=config.synthesize.temperature, max_tokens=config.synthesize.max_tokens)
    connections.critic.update_weights(config.critic.model, 0)
    size = config.synthesize.chunk

    def work(part: Sequence[tuple[Problem, Solution]], number: int, log: WriteAheadLog) -> list[Critique]:
        hinted = [(problem, solution, hint(problem, solution)) for problem, solution in part]
        seeded = replace(sampling, seed=config.seed * 1_000_003 + number * size)

        def made() -> list[Critique]:
            return [_slim(item) for item in critique_with_hints(hinted, connections.critic, run.prompts, seeded)]

        return log.once("hinted", number, Critique, made)

    folder = run.folder / "synthesize"
    with Steps("synthesize: critiques from hints", len(pairs)) as steps:
        written = folder / "written.jsonl"
        critiques = in_parts(
            written, Critique, pairs, work, size=size, at_once=1, tell=lambda done, _: steps.reach(done)
        )
    judged = list(zip(critiques, (solution for _, solution in pairs), strict=True))
    kept, rejected = select(
        judged,
        n=config.synthesize.n_critiques,
        balance=config.synthesize.balance,
        consistent_only=config.synthesize.consistent_only,
        seed=config.seed,
    )
    shares = _tell(judged)
    jsonl.write(folder / "rejected.jsonl", rejected)
    jsonl.write(folder / "critiques.jsonl", kept)
    written.unlink(missing_ok=True)
    if not kept:
        raise ValueError(
            f"synthesize: none of {len(critiques)} critiques is kept: {mend(critiques, rejected)}; then run "
            f"`ctrl-hpc synthesize CONFIG --redo`. They are in {run.folder / 'synthesize' / 'rejected.jsonl'}"
        )
    return {"critiques": len(kept), "dropped": counts(rejected), "shares": shares}


def _slim(critique: Critique) -> Critique:
    """Without prompt and log-probs: stage I learns its tokens under another prompt."""
    if critique.generation is None:
        return critique
    return replace(critique, generation=replace(critique.generation, prompt_ids=(), logprobs=()))


SHOWN_TEXTS, SHOWN_CHARACTERS = 2, 240
"""Critiques of each kind that ``synthesize`` prints, and how much of each."""


def _tell(judged: Sequence[tuple[Critique, Solution]]) -> dict[str, float]:
    """What share of the critiques is judged, cut off, and so on, printed with a few texts of each."""
    shares = {}
    for name, found in traits(judged).items():
        shares[name] = round(len(found) / max(1, len(judged)), 4)
        console.print(f"synthesize: {name}: {shares[name]:.1%} of {len(judged)} critiques")
        for item in found[:SHOWN_TEXTS]:
            console.print(Text(f"  {item.id}: {item.text[:SHOWN_CHARACTERS]!r}"))
    return shares


def sft(run: Run, connections: Connections | None) -> dict[str, Any]:
    """Supervised fine-tuning of the critic on those critiques, without the hint."""
    run_trainer(run.config, run.folder, "sft", run.prefork)
    return {}


def rl(run: Run, connections: Connections | None) -> dict[str, Any]:
    """GRPO: the critic is rewarded when the fixed generator's revision passes all tests."""
    run_trainer(run.config, run.folder, "rl", run.prefork)
    return {}


def evaluate(run: Run, connections: Connections) -> dict[str, Any]:
    """Critique-revision turns of every critic on the evaluation problems."""
    problems = {name: list(items) for name, items in run.eval_problems.items()}
    evaluation.run(run.config, run.folder, connections, problems, run.prompts, catalog.ORACLES)
    return {}


def report(run: Run, connections: Connections | None) -> dict[str, Any]:
    """Tables, plots and ``report/results.json`` from the records of the run."""
    reporting.write(run.config, run.folder)
    return {}


FUNCTIONS: dict[str, Callable[[Run, Any], dict[str, Any]]] = {
    "sample": sample,
    "synthesize": synthesize,
    "sft": sft,
    "rl": rl,
    "eval": evaluate,
    "report": report,
}
"""What each of :data:`ctrl_hpc.config.stages.STAGES` does."""


def run(config: Config, stages: Iterable[str] | None = None) -> Path:
    """Run those of the stages (None: ``config.stages``) that are not done yet, in order; returns the run's folder.

    :mod:`ctrl_hpc.preflight` tells beforehand what would end it. Raises ValueError, before anything starts, for a
    folder that holds another run.
    """
    wanted = config.stages if stages is None else tuple(stages)
    folder = directory.check(config)
    names = [name for name in STAGES if name in wanted]
    todo = [name for name in names if not directory.is_done(folder, name)]
    for name in names:
        if name not in todo:
            console.print(f"{name}: done before, skipped")
    if todo:
        here = _with_models(config, folder)
        with ExitStack() as stack:
            services = stack.enter_context(Services(here, folder))  # the only driver of the run from here on
            directory.prepare(config, jail=rootfs.contents(config.executor.python, config.executor.packages).named())
            stack.enter_context(mirrored(config, folder))
            stack.callback(services.keep, ())  # at the end, before the mirror waits for a server
            needed = roles(here, todo)
            prefork = services.import_ahead([*needed, *({"trainer"} if {"sft", "rl"} & set(todo) else ())])
            this = replace(prepare(here, folder, todo), prefork=prefork)
            services.submit(role for role in needed if prefork is None or role not in prefork.roles)
            connections = connect(here, folder, this.every_problem()) if needed else None
            if connections is not None:
                stack.callback(connections.close)
            services.submit(needed)  # those too that wait for imports
            for index, name in enumerate(todo):
                services.keep(roles(here, todo[index:]))
                services.await_first(roles(here, [name]))
                _run_stage(name, this, connections)
    return folder


@contextmanager
def mirrored(config: Config, folder: Path) -> Iterator[None]:
    """Shows in wandb, TensorBoard and MLflow what the run journals, where that is wanted."""
    with ExitStack() as shown:
        if config.tracking.writers:
            from ctrl_hpc.tracking.writers import LiveWriters

            shown.enter_context(LiveWriters(config, folder))
        if config.wandb.mode != "disabled":
            from ctrl_hpc.tracking.mirror import LiveMirror

            shown.enter_context(LiveMirror(config, folder))
        yield


def redo(config: Config, name: str) -> list[tuple[Path, Path]]:
    """Put what a stage and those after it have made aside, so that they are done again, with other settings too.

    Returns the moves. Raises ValueError where a driver works on the run, or there is nothing of the stage.
    """
    folder = Path(config.run_dir or "")
    Services(config, folder).refuse_second_driver()
    moves = directory.put_aside(folder, name)
    console.print(f"put aside: {', '.join(str(aside) for _, aside in moves)}")
    return moves


def prepare(config: Config, folder: Path, names: Iterable[str]) -> Run:
    """The run's models, prompts and those problems that the stages use, made or read back."""
    config = _with_models(config, folder)
    _make_models(config, folder)
    training = {"sample", "synthesize", "sft", "rl"} & set(names)
    tests = problems_of.store(folder)
    problems = _training_problems(config, folder, tests) if training else ()
    evaluated = {name: _eval_problems(config, folder, name, tests) for name in config.data.eval_names}
    if "eval" in set(names):
        _pairs(config, folder)
        _labelled_answers(config, folder)
    prompts = Prompts.load(**asdict(config.prompts))
    return Run(config=config, folder=folder, tests=tests, problems=problems, eval_problems=evaluated, prompts=prompts)


def _run_stage(name: str, this: Run, connections: Connections | None) -> None:
    """One stage, timed; its ``done.json`` is written last."""
    console.rule(f"[bold]{name}")
    started = time.monotonic()
    before = directory.spent_before(this.folder, name)
    try:
        if name == "rl":
            _check_conditions(this, connections)
        facts = _unless_disk_is_full(name, this, connections)
    except BaseException:
        directory.add_attempt(this.folder, name, time.monotonic() - started)
        raise
    seconds = before + time.monotonic() - started
    directory.mark_done(this.folder, name, seconds, **facts)
    told = ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )
    console.print(f"{name}: done in {seconds:.1f} s{': ' + told if told else ''}")


def _unless_disk_is_full(name: str, this: Run, connections: Connections | None) -> dict[str, Any]:
    """A stage, continued when there is space again where the disk was full."""
    while True:
        try:
            return FUNCTIONS[name](this, connections)
        except OSError as error:
            if error.errno not in disk.FULL:
                raise
            disk.await_space(this.folder, this.config.launch.disk_patience_s)


def _check_conditions(this: Run, connections: Connections | None) -> None:
    """Before RL in the tiny world: the conditions under which the revision's reward is honest, printed."""
    if this.config.data.name != "tiny" or connections is None:
        return
    from ctrl_hpc.tiny.probe import probe

    connections.critic.update_weights(this.config.critic.model, 0)
    conditions = probe(this.problems, connections.generator, connections.critic, connections.executor, this.prompts)
    table = Table(title="conditions of an honest reward", title_justify="left")
    for column in ("condition", "value", "allowed", ""):
        table.add_column(column, justify="right" if column == "value" else "left")
    for condition in conditions:
        allowed = f"{condition.allowed_low:.2f} to {condition.allowed_high:.2f}"
        table.add_row(condition.name, f"{condition.value:.3f}", allowed, "ok" if condition.ok else "VIOLATED")
    console.print(table)
    jsonl.write(this.folder / "rl" / "conditions.jsonl", conditions)
    broken = [condition.name for condition in conditions if not condition.ok]
    if broken and this.config.tiny.require_conditions:
        raise ValueError(
            f"the reward would not be honest: {', '.join(broken)}; rebuild the models with another seed "
            "(tiny.rebuild=true seed=N), or tiny.require_conditions=false"
        )


def _with_models(config: Config, folder: Path) -> Config:
    """The configuration with the places of those models that the run trains for itself, if it does."""
    if not config.tiny.rebuild:
        return config
    critic = replace(config.critic, model=str(folder / "models" / _tiny_critic(config)))
    return replace(config, generator=str(folder / "models" / "generator"), critic=critic)


def _tiny_critic(config: Config) -> str:
    """Which of ``ctrl_hpc.tiny.models.CRITICS`` is the run's."""
    return "thinking_critic" if config.critic.thinking == "on" else "critic"


def _make_models(config: Config, folder: Path) -> None:
    if not config.tiny.rebuild or directory.is_done(folder, "models"):
        return
    from ctrl_hpc.tiny.models import rebuild

    started = time.monotonic()
    rebuild(folder / "models", config.seed, critics=(_tiny_critic(config),))
    directory.mark_done(folder, "models", time.monotonic() - started)


def _training_problems(config: Config, folder: Path, tests: TestStore) -> tuple[Problem, ...]:
    file = folder / "problems" / "train.jsonl"
    if not file.exists():
        with _spool(folder) as keep:
            found = catalog.prepared(config.data, config.seed, critic=config.critic.model, keep=keep)
            _write_training(file, found, tests)
    return tuple(problems_of.read(file, tests))


def _write_training(file: Path, found: catalog.Training, tests: TestStore) -> None:
    """The training problems, and what was left out on the way to them."""
    if found.decontamination is not None:
        told = json.dumps(found.decontamination, indent=1)
        jsonl.write_text(file.with_name("decontamination.json"), told + "\n")
        console.print(found.decontamination["text"], highlight=False)
    jsonl.write_text(file.with_name("left-out.json"), json.dumps(catalog.facts(found), indent=1) + "\n")
    problems_of.write(file, found.problems, tests)


def _eval_problems(config: Config, folder: Path, name: str, tests: TestStore) -> tuple[Problem, ...]:
    file, data = folder / "problems" / f"eval-{name}.jsonl", config.data
    if not file.exists():
        with _spool(folder) as keep:
            loaded = catalog.read(name, catalog.eval_path(data, name), data.eval_split, keep=keep)
            catalog.tell(name, loaded.left_out)
            left_out = {"left_out": list(map(jsonl.encode, loaded.left_out))}
            jsonl.write_text(file.with_name(f"left-out-{name}.json"), json.dumps(left_out, indent=1) + "\n")
            drawn = data.eval_split == "train"
            taken = catalog.drawn(loaded.items, data.n_eval, config.seed) if drawn else loaded.items
            problems_of.write(file, taken[: data.n_eval], tests)
    return tuple(problems_of.read(file, tests))


@contextmanager
def _spool(folder: Path) -> Iterator[Keep]:
    """Takes the tests of a data set as it is read: those of the problems that a run takes are copied into its store."""
    place = folder / "tests.part"
    shutil.rmtree(place, ignore_errors=True)
    try:
        with TestStore(place) as tests:
            yield lambda problem: problems_of.kept(problem, tests)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _pairs(config: Config, folder: Path) -> None:
    file = pairs_file(folder)
    if config.judge.votes and not file.exists():
        jsonl.write(file, judgebench.load(config.judge.path, config.judge.split))


def _labelled_answers(config: Config, folder: Path) -> None:
    asked = config.eval.critic_benchmarks
    for source, path in asked.sources.items():
        file = questions_file(folder, source)
        if not file.exists():
            name, split = asked.parts(source)
            questions = critic_benchmarks.load(name, path or None, split)
            jsonl.write(file, questions[: asked.n_questions])


def _solutions(run: Run) -> list[Solution]:
    return jsonl.read(Solution, run.folder / "sample" / "solutions.jsonl")
