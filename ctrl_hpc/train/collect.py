"""The rollouts of a step, by rank 0: drafts critiqued, revised, executed and rewarded (paper, section 3.3)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import Connections, connect, spent
from ctrl_hpc.config import Config, RLConfig
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.reward import verdict_only
from ctrl_hpc.flow.steps import critique, execute, revise
from ctrl_hpc.records import Critique, Problem, Revision, Reward, Sampling, Solution
from ctrl_hpc.rollout.thinking import CLOSED_BY_FORCE, Thinking
from ctrl_hpc.seeds import derive_seed, sampling_seed
from ctrl_hpc.train.ahead import weights_folder
from ctrl_hpc.train.credit import Credit, Spell, by_sentence
from ctrl_hpc.train.drafts import DraftPool, fits, side_by_side
from ctrl_hpc.train.loop import Clock
from ctrl_hpc.train.rewards import SCHEDULED, Rewards, returns
from ctrl_hpc.train.rollouts import Cell, Experience, Rollout, learnable_groups, record_file, recorded, replay, rows
from ctrl_hpc.train.validation import Validation, problems_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """What a step's rollouts are made of: drafts, prompts and the services (None of these where they are replayed)."""

    config: Config
    stage: Path
    """Folder of the stage; rollouts are recorded in its ``rollouts``."""
    prompts: Prompts
    pool: DraftPool | None = None
    connections: Connections | None = None
    validation: Validation | None = None
    fits: Callable[[Problem, Solution], bool] = lambda problem, draft: True
    """Whether a draft leaves room for a critique."""
    spell: Spell = lambda ids: ""
    """The text of token ids of the critic."""

    @classmethod
    def open(cls, config: Config, run_dir: Path) -> Self:
        """Connect to the services of the run. Raises ValueError when there is no draft to critique."""
        from transformers import AutoTokenizer

        stage, prompts = run_dir / "rl", Prompts.load(**asdict(config.prompts))
        if config.rl.replay is not None:
            return cls(config=config, stage=stage, prompts=prompts)
        # An input is a token shorter than its sequence.
        room = config.trainer.micro_batch_tokens + 1 - config.rl.max_tokens - config.critic.thought_room
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "sft" / "hf")
        if config.critic.close_thought:
            room -= len(tokenizer(CLOSED_BY_FORCE, add_special_tokens=False)["input_ids"])
        limit = min(room, config.rl.max_prompt_tokens or room)
        switch = Thinking(mode=config.critic.thinking).switch
        pool = DraftPool.load(run_dir, config.seed).fitting(prompts, tokenizer, limit, **switch)
        validated = problems_of(config, run_dir)
        problems = [problem for problem, _ in pool.pairs] + [item for items in validated.values() for item in items]
        connections, lock = connect(config, run_dir, problems), threading.Lock()
        validation = Validation(
            config=config, folder=stage / "validation", connections=connections, prompts=prompts, problems=validated
        )
        return cls(
            config=config,
            stage=stage,
            prompts=prompts,
            pool=pool,
            connections=connections,
            validation=validation if validated else None,
            fits=_fitting(prompts, tokenizer, limit, lock, switch),
            spell=_spelling(tokenizer, lock),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give up the requests in flight, too."""
        if self.connections is not None:
            self.connections.close()

    def load(self, version: int) -> None:
        """Let the critic's servers load a published version, between two steps' rollouts.

        A server that is lost and comes back, or joins, loads the same before it is asked.
        """
        if self.connections is not None:
            self.connections.critic.update_weights(str(weights_folder(self.stage, version)), version)

    def samples(self, step: int, count: int) -> list[list[Cell]]:
        """Rows of ``rollouts.COLUMNS``: the first ``count`` rollouts of a step, for people to read."""
        file = recorded(self.stage / "rollouts", step)
        if file is None:
            return []
        drafts = {} if self.pool is None else {pair[1].id: pair for pair in self.pool.pairs}
        return rows(step, list(islice(jsonl.iterate(Rollout, file), count)), drafts)


def _spelling(tokenizer: Any, lock: threading.Lock) -> Spell:
    """The text of token ids; one thread at a time, as tokenizers want it."""

    def spell(ids: Sequence[int]) -> str:
        with lock:
            return tokenizer.decode(list(ids), skip_special_tokens=True)

    return spell


def _fitting(
    prompts: Prompts, tokenizer: Any, limit: int, lock: threading.Lock, switch: dict[str, bool]
) -> Callable[[Problem, Solution], bool]:
    """Whether the prompt of a critique has at most ``limit`` tokens; one thread at a time, as tokenizers want it."""

    def check(problem: Problem, draft: Solution) -> bool:
        with lock:
            return fits(prompts.critique(problem, draft), tokenizer, limit, **switch)

    return check


def collect(collector: Collector, step: int, position: int, version: int) -> Experience:
    """The experience of a step, by rank 0, from drafts at ``position`` on, by critics of ``version``; recorded on disk.

    With ``rl.refill_rounds`` more drafts are drawn in place of those whose critiques all earned the same. Raises
    RuntimeError for a critique by weights of another version, ValueError where one's own reward fails for all.
    """
    options, clock = collector.config.rl, Clock()
    with clock("load"):
        collector.load(version)
    validated: dict[str, float] = {}
    if collector.validation is not None and collector.validation.due(step):
        with clock("validate"):
            validated = collector.validation.metrics()
    if options.replay is not None:
        return Experience.of(replay(Path(options.replay), step), version=step, position=position, metrics={})
    assert collector.pool is not None
    rewards = Rewards.at(options, step, longest=options.max_tokens + collector.config.critic.thought_room)
    rollouts: list[Rollout] = []
    executed, refills = 0, 0
    for turn in range(1 + options.refill_rounds):
        missing = options.prompts_per_step - len(learnable_groups(rollouts))
        if missing == 0:
            break
        pairs = collector.pool.draw(position, missing, {item.solution_id for item in rollouts})
        position += missing
        if not pairs:
            continue
        seed = sampling_seed(collector.config.seed, step, f"critiques, round {turn}")
        made, n_runs = roll_out(collector, pairs, rewards, seed, clock)
        refills += turn > 0
        rollouts += made
        executed += n_runs
    if rollouts and all(item.reason == "reward_error" for item in rollouts):
        raise ValueError(
            f"rl.reward: {options.reward} failed for all {len(rollouts)} critiques of step {step}, see above"
        )
    others = {item.version for item in rollouts} - {version}
    if others:
        raise RuntimeError(
            f"rl: step {step}: asked version {version} for critiques, but version {min(others)} answered"
        )
    jsonl.write(record_file(collector.stage / "rollouts", step), rollouts)
    times = clock.take()
    assert collector.connections is not None
    rates = {
        "rollout/tokens_per_s": _rate(sum(len(item.token_ids) for item in rollouts), times["time/rollout_s"]),
        "executor/runs": float(executed),
        "executor/runs_per_s": _rate(executed, times["time/execute_s"]),
        "rl/refills": float(refills),
        **{f"rl/{name}": getattr(rewards, name) for name in SCHEDULED if isinstance(getattr(options, name), str)},
    }
    metrics = times | validated | rates | spent(collector.connections.generator)
    return Experience.of(rollouts, version=step, position=position, metrics=metrics)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def roll_out(
    collector: Collector, pairs: Sequence[tuple[Problem, Solution]], rewards: Rewards, seed: int, clock: Clock
) -> tuple[list[Rollout], int]:
    """The rollouts of drafts, in order, and the number of programs executed.

    Chunks of ``rl.chunk`` drafts go their way each by itself, ``rl.chunks_in_flight`` at a time: some are executed
    while others are still sampled. What comes out is the same for every size.
    """
    options = collector.config.rl
    judged_alone = verdict_only([draft for _, draft in pairs], rewards.verdict_only_share, seed)
    sampling = Sampling(temperature=options.temperature, max_tokens=options.max_tokens, n=options.group_size, seed=seed)
    size = options.chunk or len(pairs)

    def chunk(first: int) -> tuple[list[Rollout], int]:
        part = pairs[first : first + size]
        return roll_out_chunk(collector, part, judged_alone, rewards, replace(sampling, first=first), clock)

    made = side_by_side(chunk, range(0, len(pairs), size), options.chunks_in_flight)
    return [item for rollouts, _ in made for item in rollouts], sum(n_runs for _, n_runs in made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A critique of a draft, or of a revision of a turn before, and what came of it."""

    problem: Problem
    draft: Solution
    critique: Critique
    revision: Revision
    reward: Reward
    credit: tuple[Credit, ...] = ()
    """What its sentences added to the reward, with ``rl.credit=sentence``."""

    @property
    def next_draft(self) -> Solution:
        """The revision, as the draft of a next turn."""
        made, of = self.revision, self.critique.id
        return Solution(id=of, problem_id=self.problem.id, text=made.text, program=made.program, verdict=made.verdict)


def roll_out_chunk(
    collector: Collector,
    pairs: Sequence[tuple[Problem, Solution]],
    judged_alone: frozenset[str],
    rewards: Rewards,
    sampling: Sampling,
    clock: Clock,
) -> tuple[list[Rollout], int]:
    """Episodes of up to ``rl.turns`` turns, ``rl.group_size`` a draft; by draft, then turn. And the programs executed.

    An episode ends when its program is kept, as one judged correct is, when the environment fails, or when the revision
    leaves no room for a critique.
    """
    options = collector.config.rl
    made, executed = roll_out_turn(collector, pairs, judged_alone, rewards, sampling, clock)
    episodes = [[item] for item in made]
    for turn in range(1, options.turns):
        going = [
            number
            for number, (*_, last) in enumerate(episodes)
            if not last.revision.kept and not last.reward.masked and collector.fits(last.problem, last.next_draft)
        ]
        if not going:
            break
        drafts = [(episodes[number][-1].problem, episodes[number][-1].next_draft) for number in going]
        first = sampling.first * options.group_size
        seed = derive_seed(sampling.seed or 0, turn)
        drawn = replace(sampling, n=1, rows=tuple(first + number for number in going), seed=seed)
        made, more = roll_out_turn(collector, drafts, frozenset(), rewards, drawn, clock)
        executed += more
        for number, item in zip(going, made, strict=True):
            episodes[number].append(item)
    rollouts = [rollout for episode in episodes for rollout in _of_episode(episode, options)]
    order = {draft.id: number for number, (_, draft) in enumerate(pairs)}
    return sorted(rollouts, key=lambda item: (order[item.solution_id], item.turn)), executed


def _of_episode(episode: Sequence[Turn], options: RLConfig) -> list[Rollout]:
    """An episode's turns as samples; where the environment failed in one, what the others led to is not known."""
    masked = any(item.reward.masked for item in episode)
    values = returns([item.reward.value for item in episode], options)
    return [
        Rollout.of(
            item.critique,
            item.revision,
            item.draft,
            replace(item.reward, value=value, masked=masked),
            turn=number,
            begun=episode[0].draft.id,
            credit=item.credit,
        )
        for number, (item, value) in enumerate(zip(episode, values, strict=True), 1)
    ]


def roll_out_turn(
    collector: Collector,
    pairs: Sequence[tuple[Problem, Solution]],
    judged_alone: frozenset[str],
    rewards: Rewards,
    sampling: Sampling,
    clock: Clock,
) -> tuple[list[Turn], int]:
    """The method: critiques of drafts, the fixed generator's greedy revisions, their execution, the reward.

    Also the number of programs executed.
    """
    config, options, services = collector.config, collector.config.rl, collector.connections
    assert services is not None
    greedy = Sampling(temperature=0.0, max_tokens=options.max_revision_tokens)
    with clock("rollout"):
        critiques = critique(pairs, services.critic, collector.prompts, sampling)
    repeated = [pair for pair in pairs for _ in range(sampling.n)]
    triples = [(problem, draft, item) for (problem, draft), item in zip(repeated, critiques, strict=True)]
    with clock("revise"):
        revisions = revise(triples, services.generator, collector.prompts, greedy, skip=judged_alone)
    todo = [(problem, revision) for (problem, _), revision in zip(repeated, revisions, strict=True)]
    runs = {(problem.id, item.program) for problem, item in todo if item.verdict is None and item.program is not None}
    with clock("execute"):
        stop = options.stop_at_first_failure
        revisions = execute(todo, services.executor, config.executor.rules, stop_at_first_failure=stop)
    samples = [(*triple, revision) for triple, revision in zip(triples, revisions, strict=True)]
    rewarded = rewards.score(samples, judged_alone)
    credits: list[tuple[Credit, ...]] = [()] * len(samples)
    if options.credit == "sentence":
        with clock("credit"):
            credits = _credits(collector, samples, rewarded, rewards, judged_alone)
    turns = [
        Turn(problem=problem, draft=draft, critique=item, revision=revision, reward=reward, credit=credit)
        for (problem, draft, item, revision), reward, credit in zip(samples, rewarded, credits, strict=True)
    ]
    return turns, len(runs)


def _credits(
    collector: Collector,
    samples: Sequence[tuple[Problem, Solution, Critique, Revision]],
    rewarded: Sequence[Reward],
    rewards: Rewards,
    judged_alone: frozenset[str],
) -> list[tuple[Credit, ...]]:
    """The credit of every sentence; of drafts that are judged alone there is none."""
    options, services = collector.config.rl, collector.connections
    assert services is not None
    rows = [n for n, (_, draft, *_) in enumerate(samples) if draft.id not in judged_alone]
    found = by_sentence(
        [samples[row] for row in rows],
        [rewarded[row] for row in rows],
        rewards,
        services.generator,
        services.executor,
        collector.prompts,
        collector.config.executor.rules,
        Sampling(temperature=0.0, max_tokens=options.max_revision_tokens),
        collector.spell,
        stop_at_first_failure=options.stop_at_first_failure,
    )
    by_row = dict(zip(rows, found, strict=True))
    return [by_row.get(row, ()) for row in range(len(samples))]
