"""Clients over the services of a run, for the driver and for rank 0 of the RL trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc.cluster.element import token
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.config import Config
from ctrl_hpc.config.tree import ORACLE
from ctrl_hpc.evaluate.critics import served
from ctrl_hpc.records import Executor, Generator, Problem
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.rollout.thinking import Thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """The three clients of a run."""

    critic: RolloutClient
    generator: Generator
    executor: Executor

    def close(self) -> None:
        """Close the clients' connections."""
        for client in (self.critic, self.generator, self.executor):
            close = getattr(client, "close", None)
            if close is not None:
                close()


def spent(generator: Generator) -> dict[str, float]:
    """What a commercial generator has counted so far, its cost among it, as metrics; empty for one of our own."""
    return generator.spent() if isinstance(generator, OpenAIGenerator) else {}


def connect(config: Config, run_dir: str | Path, problems: Iterable[Problem] | None = None) -> Connections:
    """Clients that find the services through the run directory, whichever are alive at the time of a call.

    ``problems`` are needed by ``generator=oracle`` only.
    """
    from ctrl_hpc.sandbox.client import ExecutorClient

    return Connections(
        critic=_rollout(config, run_dir, "critic", config.critic.model, called=_calls_critic(config)),
        generator=_generator(config, run_dir, problems),
        executor=ExecutorClient(_finder(config, run_dir, "executor"), token=token(run_dir)),
    )


def _finder(config: Config, run_dir: str | Path, role: str) -> Callable[[], Sequence[str]]:
    """How the live services of a role are found: through the registry, or as the configuration names them."""
    if role == "critic" and config.rollout.critic_urls:
        return lambda: config.rollout.critic_urls
    launch = config.launch
    registry = Registry(run_dir, heartbeat_s=launch.heartbeat_s, dead_after_s=launch.dead_after_s)
    return lambda: registry.endpoints(role)


def _calls_critic(config: Config) -> bool:
    """Whether any stage of the run may ask the critic; its folder is not needed otherwise."""
    return bool({"synthesize", "rl"} & set(config.stages)) or ("eval" in config.stages and served(config))


def _rollout(config: Config, run_dir: str | Path, role: str, model: str, *, called: bool = True) -> RolloutClient:
    return RolloutClient(
        _finder(config, run_dir, role),
        _tokenizer(model) if called else None,
        patience_s=config.launch.start_timeout_s,
        role=role,
        thinking=_thinking(config, role),
        token=_critic_key(config) if role == "critic" and config.rollout.critic_urls else token(run_dir),
    )


def _thinking(config: Config, role: str) -> Thinking:
    """Whether and how long a role's model thinks."""
    if role == "critic":
        critic = config.critic
        return Thinking(mode=critic.thinking, tokens=critic.thought_tokens, close=critic.close_thought)
    return Thinking(
        mode=config.generator_thinking,
        tokens=config.generator_thought_tokens,
        close=config.generator_close_thought,
    )


def _critic_key(config: Config) -> str | None:
    """The token for servers of the critic that are not the run's own, which never get the run's."""
    variable = config.rollout.critic_key_env
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"rollout.critic_key_env: the environment variable {variable} is not set")
    return key


def _generator(config: Config, run_dir: str | Path, problems: Iterable[Problem] | None) -> Generator:
    if config.generator == ORACLE:
        from ctrl_hpc.flow.oracle import OracleGenerator
        from ctrl_hpc.flow.prompts import Prompts

        if problems is None:
            raise ValueError("generator=oracle: the problems are needed here")
        return OracleGenerator(problems, Prompts.load(**asdict(config.prompts)))
    if config.generator_is_url:
        endpoint = config.endpoint
        return OpenAIGenerator(
            config.generator,
            config.generator_model or "",
            key_env=endpoint.key_env,
            max_in_flight=endpoint.max_in_flight,
            requests_per_min=endpoint.requests_per_min,
            max_tries=endpoint.max_tries,
            timeout_s=endpoint.timeout_s,
            price_in=endpoint.price_in,
            price_out=endpoint.price_out,
            thinking=_thinking(config, "generator"),
        )
    return _rollout(config, run_dir, "generator", config.generator)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(model).is_dir():
        raise ValueError(f"no model folder {model}")
    return AutoTokenizer.from_pretrained(model)
