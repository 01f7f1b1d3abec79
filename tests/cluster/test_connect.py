"""All services of a run at once, through the clients a driver uses."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import json_endpoint
import pytest
import random_qwen
import rollout_server

from ctrl_hpc.cluster import element, status
from ctrl_hpc.cluster.connect import connect, spent
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, CriticConfig, EndpointConfig, RolloutConfig
from ctrl_hpc.records import AssertTest, Execution, Limits, Message, Problem, Sampling

ADD = "def add(a, b):\n    return a + b\n"
EXECUTION = Execution(program=ADD, tests=(AssertTest(code="assert add(1, 2) == 3"),), limits=Limits())


@pytest.mark.slow
def test_every_role_answers(make_config: Callable[..., Config], run_dir: Path) -> None:
    critic = random_qwen.build(run_dir / "critic")
    generator = random_qwen.build(run_dir / "generator", seed=1)
    config = make_config(critic=CriticConfig(model=critic), generator=generator)
    chat = (Message(role="user", content="read the numbers"),)
    greedy = Sampling(temperature=0.0, max_tokens=12)
    began = time.monotonic()
    with Services(config, run_dir) as services:
        services.start({"executor", "critic", "generator"})
        print(f"all services after {time.monotonic() - began:.1f} s")
        connections = connect(config, run_dir)
        assert [verdict.status for verdict in connections.executor.run_many([EXECUTION] * 3)] == ["accepted"] * 3
        first = connections.critic.complete([chat], greedy)[0][0]
        frozen = connections.generator.complete([chat], greedy)[0][0]
        assert first.token_ids != frozen.token_ids
        # new weights for the critic leave the generator as it was
        connections.critic.update_weights(generator, 1)
        assert connections.critic.complete([chat], greedy)[0][0].token_ids == frozen.token_ids
        assert connections.generator.complete([chat], greedy)[0][0].token_ids == frozen.token_ids
        connections.close()
        roles = sorted(row["role"] for row in status.jobs(run_dir))
        assert roles == ["critic", "driver", "executor", "generator"]


def test_the_oracle_needs_problems_and_a_url_a_model(make_config: Callable[..., Config], run_dir: Path) -> None:
    critic = CriticConfig(model=random_qwen.build(run_dir / "critic"))
    with pytest.raises(ValueError, match="generator=oracle: the problems are needed"):
        connect(make_config(critic=critic, generator="oracle"), run_dir)
    problem = Problem(id="p", source="s", split="train", prompt="Add.", tests=(), canonical_solution=ADD)
    connections = connect(make_config(critic=critic, generator="oracle"), run_dir, [problem])
    from ctrl_hpc.flow.prompts import Prompts

    chat = Prompts.load("default", None).solution(problem)
    assert ADD.strip() in connections.generator.complete([chat], Sampling())[0][0].text
    connections.close()


def test_the_critic_may_be_served_by_others(make_config: Callable[..., Config], run_dir: Path) -> None:
    folder = random_qwen.build(run_dir / "critic")
    with rollout_server.running(folder) as url:
        rollout = RolloutConfig(critic_urls=(url,))
        config = make_config(critic=CriticConfig(model=folder), rollout=rollout, generator=url)
        config = dataclasses.replace(
            config, generator_model="any", endpoint=EndpointConfig(price_in=2.0, price_out=8.0, requests_per_min=6000.0)
        )
        with Services(config, run_dir) as services:
            services.start({"critic"})  # nothing to start
            assert [row["role"] for row in status.jobs(run_dir)] == ["driver"]
            connections = connect(config, run_dir)
            chat = (Message(role="user", content="read the numbers"),)
            greedy = Sampling(temperature=0.0, max_tokens=4)
            native = connections.critic.complete([chat], greedy)[0][0]
            assert native.token_ids and connections.generator.complete([chat], greedy)[0][0].text == native.text
            counted = spent(connections.generator)
            tokens = (counted["generator/prompt_tokens"], counted["generator/completion_tokens"])
            assert tokens == (len(native.prompt_ids), len(native.token_ids))
            assert counted["generator/cost"] == pytest.approx((2.0 * tokens[0] + 8.0 * tokens[1]) / 1e6)
            connections.close()


@contextlib.contextmanager
def asked_for() -> Iterator[tuple[str, list[str | None]]]:
    """A server that refuses everything, and the Authorization headers it was sent."""
    sent: list[str | None] = []

    def refuse(_: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        sent.append(headers.get("authorization"))
        return 401, {}, {}

    with json_endpoint.serving(refuse) as url:
        yield url, sent


def test_the_runs_token_goes_to_its_own_services_alone(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = CriticConfig(model=random_qwen.build(run_dir / "critic"))
    chat = (Message(role="user", content="read the numbers"),)

    def ask(rollout: RolloutConfig) -> None:
        connections = connect(make_config(critic=critic, rollout=rollout, generator="http://127.0.0.1:9"), run_dir)
        with pytest.raises(ValueError, match="refuses: 401"):
            connections.critic.complete([chat], Sampling(max_tokens=1))
        connections.close()

    with asked_for() as (url, sent):
        ask(RolloutConfig(critic_urls=(url,)))
        assert set(sent) == {None}
        sent.clear()
        with pytest.raises(
            ValueError, match=r"rollout\.critic_key_env: the environment variable CRITIC_KEY is not set"
        ):
            ask(RolloutConfig(critic_urls=(url,), critic_key_env="CRITIC_KEY"))
        monkeypatch.setenv("CRITIC_KEY", "theirs")
        ask(RolloutConfig(critic_urls=(url,), critic_key_env="CRITIC_KEY"))
        assert set(sent) == {"Bearer theirs"}
        sent.clear()
        with Registry(run_dir).register("critic", url, id="0"):
            ask(RolloutConfig(critic_key_env="CRITIC_KEY"))
        assert set(sent) == {f"Bearer {element.token(run_dir)}"}


def test_a_missing_model_folder_is_one_line(make_config: Callable[..., Config], run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"no model folder .*/nowhere"):
        connect(make_config(critic=CriticConfig(model=str(run_dir / "nowhere"))), run_dir)
