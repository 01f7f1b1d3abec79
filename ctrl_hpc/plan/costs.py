"""What a whole run takes: phases of a step, stages, memory of the other processes, disk, GPU-hours, API cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc.config import Config, ParallelConfig
from ctrl_hpc.evaluate.critics import unaided
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.plan.memory import adapter_parameters_of_rank
from ctrl_hpc.plan.rates import Rates, runs_per_s
from ctrl_hpc.plan.work import Work, critique_tokens
from ctrl_hpc.rollout.kv_cache import FILLS_A_CPU, REMEMBERED_BATCHES

GIB = 1 << 30
_PROCESS_BYTES = 107 << 20
_TESTS_BYTES = 64 << 20
_PROBLEM_BYTES, _DRAFT_BYTES = 3_000, 3_400
"""Memory of the driver, or of rank 0 beside the critic: a process, the tests it holds at most, a problem, a draft; as
measured in docs/scaling.md."""
_DRAFT_ON_DISK_BYTES, _ROLLOUT_TOKEN_BYTES = 2_800, 5.6
"""A draft's record; a rollout's, for a token of its prompt and its critique, compressed: measured likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, bytes, hours and money of a run whose critic is ``n_parameters`` large."""

    sample_s: float
    """Critiques of a step, by the critic's servers."""
    revise_s: float | None
    """Their revisions; None: an endpoint that names no limit decides."""
    execute_s: float
    execute_at_most_s: float
    """Where every test takes its whole limit."""
    load_s: float
    update_s: float
    publish_s: float
    """Until a version is written, beside the next step."""
    max_staleness: int
    steps: int
    draft_s: float | None
    """Stage ``sample``: its drafts."""
    sft_s: float
    driver_bytes: int
    rank0_bytes: int
    """Host memory of rank 0, beside what the critic takes on a CPU."""
    published_bytes: int
    """Of them, its part of a version that is being written."""
    server_bytes: dict[str, int]
    """Of a critic or generator server: weights, by GPU where it is divided."""
    cache_token_bytes: dict[str, int]
    """Of the same: keys and values of a token."""
    remembered_bytes: dict[str, int]
    """Of the same: rows of earlier batches, by large models on CPUs."""
    disk_bytes: dict[str, int]
    gpus: dict[str, int]
    tokens_in: int
    """Of prompts, to a commercial generator, in drafts and revisions."""
    tokens_out: int
    """Of completions, at most."""
    price: float | None
    rates: Rates

    @property
    def step_s(self) -> float:
        """A step; rollouts and update beside each other where they may be."""
        rollouts = self.load_s + self.sample_s + (self.revise_s or 0.0) + self.execute_s
        if self.max_staleness:
            return max(rollouts, self.update_s, self.publish_s)
        return rollouts + self.update_s + self.publish_s

    @property
    def run_s(self) -> float:
        """Drafts, SFT and RL; evaluation and waiting in queues are not counted."""
        return (self.draft_s or 0.0) + self.sft_s + self.steps * self.step_s

    def lines(self) -> Iterator[str]:
        """A line a fact; each tells its rate and where that is from."""
        rates = self.rates
        yield f"rl step: sample {_time(self.sample_s)} ({rates.rollout_tokens_per_s})"
        if self.revise_s is None:
            yield "rl step: revise: as fast as the endpoint (endpoint.requests_per_min is not given)"
        else:
            yield f"rl step: revise {_time(self.revise_s)} (the same rate)"
        yield (
            f"rl step: execute {_time(self.execute_s)} ({rates.executor_tests_per_s}); "
            f"{_time(self.execute_at_most_s)} where every test takes its limit"
        )
        yield (
            f"rl step: load {_time(self.load_s)}, publish {_time(self.publish_s)} beside the next step's beginning "
            f"({rates.disk_gb_per_s})"
        )
        unknown = " and the endpoint's time" if self.revise_s is None else ""
        yield f"rl step: {_time(self.step_s)} in all{unknown}"
        yield from self._stages()
        yield from self._sizes()

    def _stages(self) -> Iterator[str]:
        drafts = "as fast as the endpoint" if self.draft_s is None else _time(self.draft_s)
        yield f"stages: sample {drafts}, sft {_time(self.sft_s)}, rl {_time(self.steps * self.step_s)}"
        gpus = sum(self.gpus.values())
        if gpus:
            told = ", ".join(f"{name} {number}" for name, number in self.gpus.items() if number)
            hours = self.gpus["trainer"] * (self.sft_s + self.steps * self.step_s) / 3600
            hours += (gpus - self.gpus["trainer"]) * self.run_s / 3600
            yield f"GPU-hours: {hours:.0f} ({told}), without evaluation, restarts and waiting"
        if self.tokens_out:
            tokens = (
                f"{self.tokens_in / 1e6:.3g}M tokens of prompts, {self.tokens_out / 1e6:.3g}M of completions at most"
            )
            cost = (
                "endpoint.price_in, price_out not given" if self.price is None else f"{self.price:.2f} (prices given)"
            )
            yield f"API cost: {cost}: {tokens}, without evaluation"

    def _sizes(self) -> Iterator[str]:
        yield f"memory of the driver: {_size(self.driver_bytes)} (by the measured sizes of docs/scaling.md)"
        yield (
            f"host memory of rank 0 beside the critic: {_size(self.rank0_bytes)}, of it {_size(self.published_bytes)} "
            "for a version that is being written"
        )
        for role, weights in self.server_bytes.items():
            cache = self.cache_token_bytes[role]
            told = f"memory of a {role} server: weights {_size(weights)}, and {_size(1000 * cache)} for 1000 tokens"
            rows = self.remembered_bytes[role]
            yield f"{told}; at most {_size(rows)} of rows to go on from" if rows else told
        told = ", ".join(f"{kind} {_size(size)}" for kind, size in self.disk_bytes.items())
        yield f"disk: {_size(sum(self.disk_bytes.values()))} = {told}; and about half of the tests' size"


def costs(
    config: Config, architecture: Architecture, *, ranks: int, width: int, step: Work, update_s: float,
    sft_step_s: float, rates: Rates,
) -> Costs:  # fmt: skip
    """The costs of a configuration whose critic has ``width`` bytes a parameter in the trainer.

    ``step``: the work of an RL step.
    """
    rl, rollout, device_gb = config.rl, config.rollout, rates.disk_gb_per_s.value * 1e9
    servers = max(1, len(rollout.critic_urls) or rollout.critic_elements)
    jails = config.executor.elements * config.executor.workers
    adapters = adapter_parameters_of_rank(architecture, ParallelConfig(), config.lora)  # of one rank: all
    trained, whole = adapters or architecture.n_parameters, architecture.n_parameters * width
    published = adapters * width if config.publishes_adapters_alone else whole
    drafts = config.data.n_train * config.sample.n_samples
    sft_steps = config.sft.epochs * max(1, config.synthesize.n_critiques // config.sft.batch_size)
    prompt, response = config.plan.prompt_tokens, critique_tokens(config)
    tokens_in, tokens_out = _endpoint_tokens(config, step.revisions, drafts)
    limit = config.executor.limits.wall_s * config.executor.time_factor
    part = published // ranks * (2 if rl.publish == "delta" else 1)
    serving = _served(config, architecture)
    endpoint = config.endpoint
    priced = endpoint.price_in or endpoint.price_out
    return Costs(
        sample_s=step.critiques * response / (rates.rollout_tokens_per_s.value * servers),
        revise_s=_generated_s(config, rates, step.revisions, rl.max_revision_tokens),
        execute_s=step.revisions / (runs_per_s(config.plan, rates) * jails),
        execute_at_most_s=step.revisions * config.plan.tests_per_program * limit / jails,
        load_s=published / device_gb,
        update_s=update_s,
        publish_s=published / device_gb,
        max_staleness=rl.max_staleness,
        steps=rl.steps,
        draft_s=_generated_s(config, rates, drafts, config.sample.max_tokens),
        sft_s=sft_steps * sft_step_s,
        driver_bytes=_PROCESS_BYTES + _TESTS_BYTES + _PROBLEM_BYTES * config.data.n_train + _DRAFT_BYTES * drafts,
        rank0_bytes=_PROCESS_BYTES + _DRAFT_BYTES * drafts + part,
        published_bytes=part,
        server_bytes={role: 2 * found.n_parameters // rollout.tensor for role, found in serving.items()},
        cache_token_bytes={role: _cache_bytes(found) for role, found in serving.items()},
        remembered_bytes={role: _remembered_bytes(config, found) for role, found in serving.items()},
        disk_bytes={
            "versions": (rl.max_staleness + 3) * published,
            "checkpoints": config.trainer.keep_checkpoints * trained * (width + 12),
            "exports": 2 * whole,
            "drafts": drafts * _DRAFT_ON_DISK_BYTES,
            "rollouts": round(rl.steps * step.critiques * (prompt + response) * _ROLLOUT_TOKEN_BYTES),
        },
        gpus=_gpus(config, ranks),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        price=(tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6 if priced else None,
        rates=rates,
    )


def critic_benchmarks(config: Config, sizes: Mapping[str, tuple[int, int] | None], rates: Rates) -> Iterator[str]:
    """A line a benchmark of critics in the stage ``eval``: its critiques, and the time of the critic's servers at most.

    ``sizes``: answers and pairs of each source; None: not known here.
    """
    asked, critics = config.eval.critic_benchmarks, unaided(config)
    servers = max(1, len(config.rollout.critic_urls) or config.rollout.critic_elements)
    for source, size in sizes.items():
        if size is None:
            yield f"eval: {source}: its size is not known here; eval.critic_benchmarks.n_questions limits it"
            continue
        critiques = size[0] * asked.votes + size[1] * asked.pairwise * 2 * ((asked.votes + 1) // 2)
        tokens = len(critics) * critiques * (config.eval.max_tokens + config.critic.thought_room)
        yield (
            f"eval: {source}: {critiques} critiques and comparisons by each of {len(critics)} critics, at most "
            f"{_time(tokens / (rates.rollout_tokens_per_s.value * servers))} ({rates.rollout_tokens_per_s})"
        )


def _generated_s(config: Config, rates: Rates, requests: float, tokens: int) -> float | None:
    """Seconds that the generator takes for so many completions of so many tokens at most."""
    if config.generator_is_url:
        per_min = config.endpoint.requests_per_min
        return None if per_min is None else 60 * requests / per_min
    if not config.generator_is_served:
        return 0.0
    tokens += config.generator_thought_room
    return requests * tokens / (rates.rollout_tokens_per_s.value * max(1, config.rollout.generator_elements))


def _endpoint_tokens(config: Config, revisions: float, drafts: int) -> tuple[int, int]:
    """Tokens to and from a commercial generator: drafts, and the revisions, so many a step."""
    if not config.generator_is_url:
        return 0, 0
    rl, prompt = config.rl, config.plan.prompt_tokens
    revised = round(rl.steps * revisions)
    sent = drafts * prompt + revised * (prompt + rl.max_tokens)
    return sent, drafts * config.sample.max_tokens + revised * rl.max_revision_tokens


def _served(config: Config, architecture: Architecture) -> dict[str, Architecture]:
    """What the arrays serve, as far as its sizes are known."""
    found = {} if config.rollout.critic_urls else {"critic": architecture}
    if config.generator_is_served:
        try:
            known = (Path(config.generator) / "config.json").is_file()
            found["generator"] = (architectures.read if known else architectures.known)(config.generator)
        except ValueError:
            pass  # a model of another kind: its server's memory is not told
    return found


def _cache_bytes(found: Architecture) -> int:
    """Keys and values of a token, in 2 bytes a number."""
    return 2 * 2 * found.n_layers * found.n_kv_heads * found.head_dim


def _remembered_bytes(config: Config, found: Architecture) -> int:
    rollout = config.rollout
    on_cpu = rollout.device == "cpu" or (rollout.device == "auto" and not config.launch.rollout.gpus)
    if rollout.engine != "builtin" or not on_cpu or found.n_parameters < FILLS_A_CPU:
        return 0
    return REMEMBERED_BATCHES * rollout.max_batch_tokens * _cache_bytes(found)


def _gpus(config: Config, ranks: int) -> dict[str, int]:
    launch, rollout = config.launch, config.rollout
    critics = 0 if rollout.critic_urls else rollout.critic_elements
    generators = rollout.generator_elements if config.generator_is_served else 0
    return {
        "trainer": ranks * launch.trainer.gpus,
        "critic servers": critics * launch.rollout.gpus,
        "generator servers": generators * launch.rollout.gpus,
    }


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
