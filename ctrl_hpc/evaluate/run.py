"""The evaluation of a run: shared drafts, then every critic's turns on them, on disk under ``eval/DATASET/``.

``drafts.jsonl`` (sampled) and ``drafts_greedy.jsonl`` are the critic ``none`` and ``none_greedy``. Every other critic's
turns start from the sampled drafts, so that all compare on the same ones: ``CRITIC/`` with critiques sampled at
``eval.temperature``, ``CRITIC_greedy/`` with greedy ones (computed feedback has no temperature: one folder is both).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from ctrl_hpc.config import Config
from ctrl_hpc.config.facts import is_url
from ctrl_hpc.evaluate import ablation, benchmarked, judgebench
from ctrl_hpc.evaluate.critics import (
    Critic,
    Feedback,
    Oracles,
    check_oracles,
    critics,
    feedback_critiques,
    feedback_of,
    unaided,
)
from ctrl_hpc.evaluate.tree import Environment, Sample, Shape, Write, grow, is_grown
from ctrl_hpc.evaluate.write_ahead import RememberingExecutor, RememberingGenerator, WriteAheadLog, in_parts
from ctrl_hpc.flow.feedback import hint
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique, critique_with_hints, draft, elect, execute
from ctrl_hpc.progress import Steps
from ctrl_hpc.records import EVALUATION, Critique, Executor, Generator, Problem, Sampling, Solution
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.seeds import evaluation_seed

MODES = ("", "_greedy")
"""What is appended to a critic's name: sampled, and greedy."""


class CriticServers(Generator, Protocol):
    """The rollout array of the critic."""

    def update_weights(self, folder: str, version: int) -> object:
        """Let every server load a Hugging Face folder."""
        ...


class Connected(Protocol):
    """What the evaluation talks to (:func:`ctrl_hpc.cluster.connect.connect`)."""

    @property
    def critic(self) -> CriticServers | None:
        """Serves the critics that are folders."""
        ...

    @property
    def generator(self) -> Generator:
        """The fixed generator."""
        ...

    @property
    def executor(self) -> Executor:
        """Runs programs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The turns of one critic on one data set in one mode."""

    dataset: str
    critic: str
    mode: str
    folder: Path


def run(
    config: Config,
    run_dir: Path,
    connections: Connected,
    problems: dict[str, list[Problem]],
    prompts: Prompts,
    oracles: Oracles | None = None,
) -> None:
    """Evaluate every critic of ``eval.critics`` on every data set; what is on disk already is not done again.

    Raises ValueError when a critic is unknown or has no model.
    """
    chosen, oracles = critics(config), oracles or {}
    check_oracles(config, oracles)
    places = {name: item.model(config, run_dir) for name, item in chosen.items() if item.model is not None}
    for name, place in places.items():
        if not is_url(place) and not (Path(place) / "config.json").is_file():
            raise ValueError(f"eval.critics: {name}: {place} is not a Hugging Face model folder (no config.json)")
    environment = Environment(
        generator=RememberingGenerator(connections.generator),
        executor=RememberingExecutor(connections.executor),
        prompts=prompts,
        rules=config.executor.rules,
        revision=Sampling(temperature=0.0, max_tokens=config.eval.max_tokens),
        stop_when_correct=config.eval.stop_when_correct,
    )
    trees = [tree for name, item in chosen.items() for tree in _trees_of(config, run_dir, name, item)]
    judged = len(places) if config.judge.votes else 0
    scored, sources = unaided(config), config.eval.critic_benchmarks.sources
    turns = config.eval.turns
    total = len(problems) + turns * len(trees) + judged + len(scored) * len(sources)
    with Steps("eval: drafts, then turns", total) as steps:
        drafts = {}
        for dataset, items in problems.items():
            drafts[dataset] = _draft_all(config, run_dir, dataset, items, environment)
            steps.advance(note=f"{dataset}: drafts")
        done = len(problems)
        version = max(EVALUATION, int(time.time() * 1000))
        for name, item in chosen.items():
            version += 1
            serve = cache(partial(_load, places.get(name, ""), connections, version))
            for tree in (tree for tree in trees if tree.critic == name):
                if not is_grown(tree.folder, turns):
                    critic = None if item.model is None else serve()
                    write = _writer(config, tree, item, critic, prompts, feedback_of(item, oracles))
                    tell = _teller(steps, done, f"{tree.dataset}: {tree.critic}{tree.mode}")
                    grow(drafts[tree.dataset], write, environment, tree.folder, _shape(config, tree), tell)
                if config.eval.ablate:
                    ablation.run(drafts[tree.dataset], environment, tree.folder, oracles, config.eval.chunk)
                done += turns
                steps.reach(done, f"{tree.dataset}: {tree.critic}{tree.mode}")
            if config.judge.votes and item.model is not None:
                critic = None if judgebench.votes_file(run_dir, name).exists() else serve()
                judgebench.judge(config, run_dir, name, critic, prompts)
                done += 1
                steps.reach(done, f"judgebench: {name}")
            for source in sources if name in scored else ():
                benchmarked.judge(config, run_dir, source, name, serve, prompts)
                done += 1
                steps.reach(done, f"{source}: {name}")


def _shape(config: Config, tree: Tree) -> Shape:
    return Shape(
        widths=widths(config),
        chunk=config.eval.chunk,
        at_once=config.eval.chunks_in_flight,
        seed=evaluation_seed(config.seed, tree.dataset, tree.critic + tree.mode),
    )


def _teller(steps: Steps, before: int, name: str) -> Callable[[int, int, int], None]:
    """Shows a tree's progress; ``before`` turns were done before it."""
    return lambda turn, done, total: steps.reach(
        before + turn - (done < total), f"{name}, turn {turn}: {done} of {total} samples"
    )


def widths(config: Config) -> tuple[int, ...]:
    """Critiques of each sample in each turn."""
    return config.eval.widths[1:] or (1,) * config.eval.turns


def _trees_of(config: Config, run_dir: Path, name: str, critic: Critic) -> list[Tree]:
    """The trees of a critic: none for ``none``; computed feedback has no greedy one of its own."""
    if critic.model is None and critic.feedback is None and not critic.oracle:
        return []
    modes = MODES if config.eval.greedy and critic.model is not None else MODES[:1]
    return [
        Tree(dataset=dataset, critic=name, mode=mode, folder=folder_of(run_dir, dataset, name, critic, mode))
        for dataset in config.data.eval_names
        for mode in modes
    ]


def folder_of(run_dir: Path, dataset: str, name: str, critic: Critic, mode: str) -> Path:
    """Where the turns of a critic in a mode lie."""
    return run_dir / "eval" / dataset / (name + mode if critic.model is not None else name)


def drafts_file(run_dir: Path, dataset: str, mode: str) -> Path:
    """Where the drafts of a mode lie."""
    return run_dir / "eval" / dataset / f"drafts{mode}.jsonl"


def _draft_all(
    config: Config, run_dir: Path, dataset: str, problems: Sequence[Problem], environment: Environment
) -> list[Sample]:
    """The sampled drafts, executed; the greedy ones are made and executed beside them."""
    sampled: list[Solution] = []
    for mode in MODES if config.eval.greedy else MODES[:1]:
        file = drafts_file(run_dir, dataset, mode)
        temperature, n = (0.0, 1) if mode else (config.eval.temperature, config.eval.n_samples)
        sampling = Sampling(temperature=temperature, max_tokens=config.eval.max_tokens, n=n)

        def work(
            part: Sequence[Problem], number: int, log: WriteAheadLog, sampling: Sampling = sampling
        ) -> list[Solution]:
            seed = evaluation_seed(config.seed, dataset, "drafts", number)
            seeded = replace(sampling, seed=seed)
            return executed_drafts(
                part,
                number,
                log,
                lambda: draft(part, environment.generator, environment.prompts, seeded),
                lambda pairs: execute(pairs, environment.executor, environment.rules),
            )

        size = max(config.eval.chunk // n, 1)
        solutions = in_parts(file, Solution, problems, work, size=size, at_once=config.eval.chunks_in_flight)
        sampled = sampled or solutions
    by_id = {problem.id: problem for problem in problems}
    return [(by_id[solution.problem_id], solution) for solution in sampled]


def executed_drafts(
    problems: Sequence[Problem],
    number: int,
    log: WriteAheadLog,
    drafted: Callable[[], list[Solution]],
    executed: Callable[[list[tuple[Problem, Solution]]], list[Solution]],
) -> list[Solution]:
    """The drafts of a part, made and then executed, each written down before the next is begun."""
    solutions = log.once("drafts", number, Solution, drafted)
    by_id = {problem.id: problem for problem in problems}
    pairs = [(by_id[solution.problem_id], solution) for solution in solutions]
    return log.once("executed", number, Solution, lambda: executed(pairs))


def _load(place: str, connections: Connected, version: int) -> Generator:
    if is_url(place):
        url, _, model = place.partition("#")
        if not model:
            raise ValueError(f"eval.models: {place!r} names no model; expected URL#MODEL")
        return OpenAIGenerator(url, model)
    if connections.critic is None:
        raise ValueError(f"eval.critics: no critic server runs to serve {place}")
    connections.critic.update_weights(place, version)
    return connections.critic


def _writer(
    config: Config,
    tree: Tree,
    item: Critic,
    critic: Generator | None,
    prompts: Prompts,
    feedback: Feedback | None,
) -> Write:
    if feedback is not None:
        return lambda samples, width, seed: _copies(feedback_critiques(samples, feedback), width)
    assert critic is not None
    temperature = 0.0 if tree.mode else config.eval.temperature
    sampling = Sampling(temperature=temperature, max_tokens=config.eval.max_tokens)
    asked = RememberingGenerator(critic)
    votes = config.eval.votes
    return partial(_ask, critic=asked, prompts=prompts, sampling=sampling, votes=votes, hinted=item.hinted)


def _ask(
    samples: Sequence[Sample],
    width: int,
    seed: int,
    *,
    critic: Generator,
    prompts: Prompts,
    sampling: Sampling,
    votes: int,
    hinted: bool = False,
) -> list[Critique]:
    """``width`` critiques of each sample, each elected by ``votes`` judgements; greedy ones are all the same."""
    greedy = sampling.temperature == 0.0
    sampling = replace(sampling, seed=seed, n=1 if greedy else width * votes)
    if hinted:
        shown = [(problem, solution, hint(problem, solution)) for problem, solution in samples]
        written = critique_with_hints(shown, critic, prompts, sampling)
    else:
        written = critique(samples, critic, prompts, sampling)
    if greedy:
        return _copies(written, width)
    return [elect(written[start : start + votes]) for start in range(0, len(written), votes)]


def _copies(critiques: Sequence[Critique], width: int) -> list[Critique]:
    return [item for item in critiques for _ in range(width)]
