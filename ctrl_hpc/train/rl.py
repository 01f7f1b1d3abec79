"""Stage ``rl``: GRPO on the reward of the revised program (paper, section 3.3).

Rank 0 talks to the services: the critic's rollout array, the fixed generator, the executors. Every rank holds the same
experience and takes its part of the update.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import spent
from ctrl_hpc.config import Config, RLConfig
from ctrl_hpc.flow.reward import score, score_verdict, verdict_only
from ctrl_hpc.flow.steps import critique, execute, revise
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.megatron.parallel_state import World
from ctrl_hpc.records import Problem, Sampling, Solution
from ctrl_hpc.run.journal import Table
from ctrl_hpc.seeds import sampling_seed
from ctrl_hpc.train.advantages import Advantages, estimate
from ctrl_hpc.train.ahead import Source, weights_folder
from ctrl_hpc.train.batch import Batch
from ctrl_hpc.train.drafts import side_by_side
from ctrl_hpc.train.loop import Clock, Loop, learning_rate
from ctrl_hpc.train.losses import RLLoss, ValueLoss
from ctrl_hpc.train.policy import Policy, Reference, Value, make_reference
from ctrl_hpc.train.rollouts import COLUMNS, Experience, Rollout, learnable_groups, record_file, replay


def run(config: Config, run_dir: str | Path) -> None:
    """Train on every rank of the job, from ``run_dir/sft/hf``; the critic ends in ``run_dir/rl/hf``.

    Continues from the last checkpoint in ``run_dir/rl/checkpoints``. Raises ValueError for what the user can mend.
    """
    check(config.rl)
    with parallel_state.job(config) as world:
        train(config, Path(run_dir), world)


def check(options: RLConfig) -> None:
    """Refuse, in one line naming the key, settings that cannot work.

    Raises ValueError.
    """
    if options.max_staleness < 0:
        raise ValueError(
            f"rl.max_staleness={options.max_staleness} is not allowed; allowed: 0 (rollouts by the newest weights), "
            "or a number of versions that rollouts may be old"
        )
    if options.group_size < 2 and options.estimator != "gae":
        raise ValueError(f"rl.group_size={options.group_size} is not allowed; critiques are compared in groups of >= 2")
    if not options.temperature > 0:
        raise ValueError(f"rl.temperature={options.temperature} is not allowed; it must be > 0")


def train(config: Config, run_dir: Path, world: World) -> None:
    """The loop: rollout, revise, execute and reward; advantages, update, publish, log and save. Then export.

    With ``rl.max_staleness`` the rollouts are made ahead, beside the rest (``ctrl_hpc.train.ahead``).
    """
    options, sft = config.rl, run_dir / "sft" / "hf"
    policy = Policy(config, world, sft, optimizer=options.optimizer)
    reference = make_reference(policy, sft, options.reference) if options.kl_coef else None
    value = Value(config, world, sft, optimizer=options.value_optimizer) if options.estimator == "gae" else None
    parts = {"policy": policy} | ({"value": value} if value is not None else {})
    with ExitStack() as stack:
        source = stack.enter_context(Source.open(config, run_dir)) if world.main else None
        loop = Loop(config, run_dir, "rl", parts, steps=options.steps, save_every=options.save_every, position=0)
        stack.enter_context(loop)
        publish(policy, source, loop.folder, loop.start, sft)
        for step in loop:
            with loop.clock("wait"):
                experience = world.from_main(_experience, source, step, loop.progress["position"])
            with loop.clock("advantages"):
                values_SR = value.values(experience.batch) if value else None
                advantages = estimate(
                    experience, values_SR, options, device=world.device, backend=config.trainer.kernels
                )
            logged = improve(policy, value, reference, experience, advantages, step, loop.clock)
            with loop.clock("publish"):
                publish(policy, source, loop.folder, step + 1, sft)
            loop.done(step, experience.metrics | logged, partial(samples, source, step), position=experience.position)
    policy.export(run_dir / "rl" / "hf", source=sft)


def samples(source: Source | None, step: int) -> dict[str, Table]:
    """Some rollouts of a step, for people to read."""
    assert source is not None, "rank 0 has a source"
    return {"rl/samples": Table(columns=COLUMNS, rows=source.samples(step, source.config.rl.save_samples))}


def _experience(source: Source | None, step: int, position: int) -> Experience:
    assert source is not None, "rank 0 has a source"
    return source.experience(collect, step, position)


def collect(source: Source, step: int, position: int, version: int) -> Experience:
    """The experience of a step, by rank 0, from drafts at ``position`` on, by critics of ``version``; recorded on disk.

    With ``rl.refill_rounds`` more drafts are drawn in place of those whose critiques all earned the same. Raises
    RuntimeError for a critique by weights of another version.
    """
    options, clock = source.config.rl, Clock()
    with clock("load"):
        source.load(version)
    validated: dict[str, float] = {}
    if source.validation is not None and source.validation.due(step):
        with clock("validate"):
            validated = source.validation.metrics()
    if options.replay is not None:
        return Experience.of(replay(Path(options.replay), step), version=step, position=position, metrics={})
    assert source.pool is not None
    rollouts: list[Rollout] = []
    executed, refills = 0, 0
    for turn in range(1 + options.refill_rounds):
        missing = options.prompts_per_step - len(learnable_groups(rollouts))
        if missing == 0:
            break
        pairs = source.pool.draw(position, missing, {item.solution_id for item in rollouts})
        position += missing
        if not pairs:
            continue
        seed = sampling_seed(source.config.seed, step, f"critiques, round {turn}")
        made, n_runs = roll_out(source, pairs, seed, clock)
        refills += turn > 0
        rollouts += made
        executed += n_runs
    others = {item.version for item in rollouts} - {version}
    if others:
        raise RuntimeError(
            f"rl: step {step}: asked version {version} for critiques, but version {min(others)} answered"
        )
    jsonl.write(record_file(source.folder, step), rollouts)
    times = clock.take()
    assert source.connections is not None
    rates = {
        "rollout/tokens_per_s": _rate(sum(len(item.token_ids) for item in rollouts), times["time/rollout_s"]),
        "executor/runs": float(executed),
        "executor/runs_per_s": _rate(executed, times["time/execute_s"]),
        "rl/refills": float(refills),
    }
    metrics = times | validated | rates | spent(source.connections.generator)
    return Experience.of(rollouts, version=step, position=position, metrics=metrics)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def roll_out(
    source: Source, pairs: Sequence[tuple[Problem, Solution]], seed: int, clock: Clock
) -> tuple[list[Rollout], int]:
    """The rollouts of drafts, in order, and the number of programs executed.

    Chunks of ``rl.chunk`` drafts go their way each by itself, ``rl.chunks_in_flight`` at a time: some are executed
    while others are still sampled. What comes out is the same for every size.
    """
    options = source.config.rl
    judged_alone = verdict_only([draft for _, draft in pairs], options.verdict_only_share, seed)
    sampling = Sampling(temperature=options.temperature, max_tokens=options.max_tokens, n=options.group_size, seed=seed)
    size = options.chunk or len(pairs)

    def chunk(first: int) -> tuple[list[Rollout], int]:
        part = pairs[first : first + size]
        return roll_out_chunk(source, part, judged_alone, replace(sampling, first=first), clock)

    made = side_by_side(chunk, range(0, len(pairs), size), options.chunks_in_flight)
    return [item for rollouts, _ in made for item in rollouts], sum(n_runs for _, n_runs in made)


def roll_out_chunk(
    source: Source,
    pairs: Sequence[tuple[Problem, Solution]],
    judged_alone: frozenset[str],
    sampling: Sampling,
    clock: Clock,
) -> tuple[list[Rollout], int]:
    """The method: critiques of drafts, the fixed generator's greedy revisions, their execution, the reward.

    Also the number of programs executed.
    """
    config, options, services = source.config, source.config.rl, source.connections
    assert services is not None
    greedy = Sampling(temperature=0.0, max_tokens=options.max_revision_tokens)
    with clock("rollout"):
        critiques = critique(pairs, services.critic, source.prompts, sampling)
    repeated = [pair for pair in pairs for _ in range(options.group_size)]
    triples = [(problem, draft, item) for (problem, draft), item in zip(repeated, critiques, strict=True)]
    with clock("revise"):
        revisions = revise(triples, services.generator, source.prompts, greedy, skip=judged_alone)
    todo = [(problem, revision) for (problem, _), revision in zip(repeated, revisions, strict=True)]
    runs = {(problem.id, item.program) for problem, item in todo if item.verdict is None and item.program is not None}
    with clock("execute"):
        revisions = execute(todo, services.executor, config.executor.limits)
    rollouts = []
    for (_, draft, item), revision in zip(triples, revisions, strict=True):
        assert draft.verdict is not None
        if draft.id in judged_alone:
            reward = score_verdict(item, draft.verdict)
        else:
            reward = score(
                item,
                revision,
                draft.verdict,
                verdict_coef=options.verdict_coef,
                transitions=options.transition_reward,
                leak_penalty=options.leak_penalty,
                draft_program=draft.program,
            )
        rollouts.append(Rollout.of(item, revision, draft.verdict, reward))
    return rollouts, len(runs)


def improve(
    policy: Policy,
    value: Value | None,
    reference: Reference | None,
    experience: Experience,
    advantages: Advantages,
    step: int,
    clock: Clock,
) -> dict[str, float]:
    """The update: ``rl.minibatches`` optimizer steps on the groups that have something to learn from.

    Log-probabilities of the old policy and of the reference are this trainer's own, never the rollout engine's; those
    of the first minibatch's old policy come from the pass of its own update. Groups whose rewards are all the same
    are left out and counted (with a value network they have advantages too, and stay).
    """
    options, seed = policy.config.rl, policy.config.seed
    groups = experience.learnable_groups() if value is None else experience.valid_groups()
    metrics = {"rl/groups": float(len(groups)), "rl/skipped_groups": float(experience.n_groups - len(groups))}
    random.Random(sampling_seed(seed, step, "minibatches")).shuffle(groups)
    n_parts = min(options.minibatches, len(groups))
    parts = [experience.rows(groups[i::n_parts]) for i in range(n_parts)]
    batches = [experience.batch.select(rows) for rows in parts]
    with clock("logprobs"):
        old = [None, *(policy.logprobs(batch, temperature=options.temperature) for batch in batches[1:])]
    with clock("reference"):
        fixed = [reference.logprobs(batch, temperature=options.temperature) if reference else None for batch in batches]
    logged: list[dict[str, float]] = []
    with clock("update"):
        for index, (rows, batch, old_SR, reference_SR) in enumerate(zip(parts, batches, old, fixed, strict=False)):
            at, total = step * options.minibatches + index, options.steps * options.minibatches
            width = batch.mask_SR.shape[1]
            loss = RLLoss.of(
                batch,
                options,
                advantages_SR=advantages.advantages_SR[rows, :width],
                rollout_SR=experience.rollout_SR[rows, :width],
                old_SR=old_SR,
                reference_SR=reference_SR,
            )
            found = policy.update(batch, loss, learning_rate(options.optimizer, at, total))
            if value is not None:
                found |= improve_value(
                    value, batch, rows, advantages, learning_rate(options.value_optimizer, at, total)
                )
            logged.append(found)
    names = logged[0] if logged else {}
    return metrics | {f"rl/{name}": sum(item[name] for item in logged) / len(logged) for name in names}


def improve_value(
    value: Value, batch: Batch, rows: Sequence[int], advantages: Advantages, rate: float
) -> dict[str, float]:
    """One optimizer step of the value network on a minibatch: ``value`` and, as ``value_*``, its loss and norm."""
    assert advantages.values_SR is not None and advantages.returns_SR is not None
    width = batch.mask_SR.shape[1]
    loss = ValueLoss(
        clip=value.config.rl.value_clip,
        old_SR=advantages.values_SR[rows, :width],
        returns_SR=advantages.returns_SR[rows, :width],
        n_tokens=batch.n_tokens,
    )
    found = value.update(batch, loss, rate)
    return {"value": found["value"], "value_loss": found["loss"], "value_grad_norm": found["grad_norm"]}


def publish(policy: Policy, source: Source | None, folder: Path, version: int, sft: Path) -> None:
    """Write the critic's weights as version ``version``, for its servers to load; every rank takes part."""
    weights = weights_folder(folder, version)
    policy.export(weights, source=sft, link=True)
    if source is not None:
        source.publish(weights, version)
