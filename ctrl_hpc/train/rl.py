"""Stage ``rl``: GRPO on the reward of the revised program (paper, section 3.3).

Rank 0 talks to the services: the critic's rollout array, the fixed generator, the executors. Every rank holds the same
experience and takes its part of the update.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ctrl_hpc.config import Config
from ctrl_hpc.config.functions import load_function
from ctrl_hpc.config.objectives import LOSSES
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.megatron.parallel_state import World
from ctrl_hpc.run.journal import Table
from ctrl_hpc.seeds import sampling_seed
from ctrl_hpc.train.advantages import OVER_THE_STEP, Advantages, estimate
from ctrl_hpc.train.ahead import Ahead
from ctrl_hpc.train.batch import Batch
from ctrl_hpc.train.collect import Collector, collect
from ctrl_hpc.train.loop import Clock, Loop, learning_rate
from ctrl_hpc.train.losses import RLLoss, ValueLoss, needs_old
from ctrl_hpc.train.policy import Policy, Reference, Value, make_reference
from ctrl_hpc.train.publish import Publisher
from ctrl_hpc.train.rollouts import COLUMNS, Experience


def run(config: Config, run_dir: str | Path) -> None:
    """Train on every rank of the job, from ``run_dir/sft/hf``; the critic ends in ``run_dir/rl/hf``.

    Continues from the last checkpoint in ``run_dir/rl/checkpoints``. Raises ValueError for what the user can mend.
    """
    with parallel_state.job(config) as world:
        train(config, Path(run_dir), world)


def train(config: Config, run_dir: Path, world: World) -> None:
    """The loop: rollouts, advantages, update, publish, log and save. Then export.

    With ``rl.max_staleness`` the rollouts are made ahead, beside the rest.
    """
    options, sft = config.rl, run_dir / "sft" / "hf"
    for key, place in (("rl.loss", options.loss), ("rl.reward", options.reward)):
        if place is not None and place not in LOSSES:
            load_function(key, place)  # a file that fails does so before anything starts
    policy = Policy(config, world, sft, optimizer=options.optimizer)
    reference = make_reference(policy, sft, options.reference) if options.kl_coef else None
    value = Value(config, world, sft, optimizer=options.value_optimizer) if options.estimator == "gae" else None
    parts = {"policy": policy} | ({"value": value} if value is not None else {})
    with ExitStack() as stack:
        collector = stack.enter_context(Collector.open(config, run_dir)) if world.main else None
        loop = Loop(config, run_dir, "rl", parts, steps=options.steps, save_every=options.save_every, position=0)
        stack.enter_context(loop)
        publisher = stack.enter_context(Publisher(policy, loop.folder, sft))
        publisher.publish(loop.start)
        publisher.wait()
        ahead = stack.enter_context(_rollouts_ahead(collector, loop)) if collector is not None else None
        for step in loop:
            with loop.clock("wait"):
                experience = world.from_main(take, ahead, step)
            with loop.clock("advantages"):
                values_SR = value.values(experience.batch) if value else None
                advantages = estimate(
                    experience, values_SR, options, device=world.device, backend=config.trainer.kernels
                )
            logged = improve(policy, value, reference, experience, advantages, step, loop.clock)
            with loop.clock("publish"):
                publisher.publish(step + 1, ahead)
            shown = partial(samples, collector, step)
            loop.done(step, experience.metrics | logged, shown, position=experience.position)
        publisher.wait()
    policy.export(run_dir / "rl" / "hf", source=sft)
    if config.lora.rank:
        policy.export_adapters(run_dir / "rl" / "adapters")


def _rollouts_ahead(collector: Collector, loop: Loop) -> Ahead:
    """The steps' rollouts from where the stage continues, being made from now on."""
    return Ahead(
        partial(collect, collector),
        loop.folder,
        start=loop.start,
        steps=loop.steps,
        position=loop.progress["position"],
        max_staleness=collector.config.rl.max_staleness,
    )


def samples(collector: Collector | None, step: int) -> dict[str, Table]:
    """Some rollouts of a step, by rank 0, for people to read."""
    assert collector is not None, "only rank 0 has rollouts"
    return {"rl/samples": Table(columns=COLUMNS, rows=collector.samples(step, collector.config.rl.save_samples))}


def take(ahead: Ahead | None, step: int) -> Experience:
    """The experience of a step, by rank 0."""
    assert ahead is not None, "only rank 0 has rollouts"
    return ahead.take(step)


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
    are left out and counted (compared with the whole step, or with a value network, they have advantages too, and
    stay).
    """
    options, seed = policy.config.rl, policy.config.seed
    whole = options.estimator in OVER_THE_STEP
    groups = experience.valid_groups() if whole else experience.learnable_groups()
    metrics = {"rl/groups": float(len(groups)), "rl/skipped_groups": float(experience.n_groups - len(groups))}
    random.Random(sampling_seed(seed, step, "minibatches")).shuffle(groups)
    n_parts = min(options.minibatches, len(groups))
    parts = [experience.rows(groups[i::n_parts]) for i in range(n_parts)]
    batches = [experience.batch.select(rows) for rows in parts]
    known = 0 if needs_old(options) else 1  # the first minibatch's old log-probabilities are the update's own
    with clock("logprobs"):
        later = [policy.logprobs(batch, temperature=options.temperature) for batch in batches[known:]]
        old = [None] * known + later
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
                seed=sampling_seed(seed, at, "covariance"),
            )
            found = policy.update(batch, loss, learning_rate(options.optimizer, at, total))
            if value is not None:
                found |= _improve_value(
                    value, batch, rows, advantages, learning_rate(options.value_optimizer, at, total)
                )
            logged.append(found)
    names = logged[0] if logged else {}
    return metrics | {f"rl/{name}": sum(item[name] for item in logged) / len(logged) for name in names}


def _improve_value(
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
