"""SGLang and vLLM as elements of the arrays: started by their command lines, asked by their routes.

The servers are stand-ins (``engine_standin.py``): neither is installed here.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import engine_standin
import psutil
import pytest
import random_qwen

from ctrl_hpc.cluster import engines
from ctrl_hpc.cluster.connect import connect
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, CriticConfig, RolloutConfig
from ctrl_hpc.config.load import load
from ctrl_hpc.records import Message, Sampling

STANDIN = Path(engine_standin.__file__)


def test_the_command_lines() -> None:
    rollout = RolloutConfig(engine="sglang", tensor=4, dtype="bfloat16", engine_args=("--mem-fraction-static", "0.8"))
    assert engines.sglang_command(rollout, "/m/critic", "0.0.0.0", 30000, Path("/t/secrets.yaml")) == [
        *(sys.executable, "-m", "sglang.launch_server", "--config", "/t/secrets.yaml"),
        *("--model-path", "/m/critic", "--host", "0.0.0.0", "--port", "30000"),
        *("--tensor-parallel-size", "4", "--dtype", "bfloat16", "--sampling-defaults", "openai"),
        *("--mem-fraction-static", "0.8"),
    ]
    rollout = dataclasses.replace(rollout, engine="vllm", engine_args=(), engine_command=("/opt/bin/vllm",))
    assert engines.vllm_command(rollout, "/m/critic", Path("/t/vllm.sock")) == [
        *("/opt/bin/vllm", "serve", "/m/critic", "--uds", "/t/vllm.sock", "--served-model-name", "/m/critic"),
        *("--tensor-parallel-size", "4", "--dtype", "bfloat16", "--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["rollout.engine=tgi"], r"rollout.engine: Invalid value 'tgi', expected one of .'builtin', 'sglang', 'vllm'"),
        (["rollout.tensor=2"], "rollout.tensor: 2 needs rollout.engine=sglang or vllm"),
        (["rollout.engine=vllm", "rl.publish=delta"], "rl.publish: delta is understood by servers of ours alone"),
    ],
)
def test_what_an_engine_cannot_do_is_told(settings: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load("tiny", settings)


@pytest.mark.parametrize(
    ("engine", "told"), [("sglang", "sglang is not installed in"), ("vllm", "vllm is not installed on this node")]
)
def test_an_engine_that_is_not_installed_is_told(
    engine: str, told: str, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=told):
        engines.serve(make_config(rollout=RolloutConfig(engine=engine)), str(tmp_path), "token", print)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engine_serves_and_loads_weights_and_one_that_ends_is_replaced(
    engine: str, make_config: Callable[..., Config], run_dir: Path
) -> None:
    critic = Path(random_qwen.build(run_dir / "critic"))
    newer = run_dir / "newer"
    newer.mkdir()
    (newer / "version").write_text("5")
    rollout = RolloutConfig(
        engine=engine,  # type: ignore[arg-type]
        engine_command=(sys.executable, str(STANDIN), engine),
        tensor=2,
        engine_args=("--mem-fraction-static=0.8",) if engine == "sglang" else ("--gpu-memory-utilization=0.8",),
    )
    config = make_config(critic=CriticConfig(model=str(critic)), rollout=rollout)
    chat, sampling = (Message(role="user", content="2 + 2"),), Sampling(temperature=1.0, max_tokens=9, n=2, seed=3)
    with Services(config, run_dir) as services:
        services.start({"critic"})
        connections = connect(config, run_dir)
        first = connections.critic.complete([chat], sampling)[0]
        assert all(len(item.token_ids) == 3 and item.logprobs == (-0.5,) * 3 for item in first)
        assert [item.version for item in first] == [0, 0] and first[0].token_ids != first[1].token_ids
        assert connections.critic.update_weights(str(newer), 5) == 1
        second = connections.critic.complete([chat], sampling)[0]
        assert [item.version for item in second] == [5, 5]
        assert [tuple(token + 5 for token in item.token_ids) for item in first] == [item.token_ids for item in second]
        if engine == "vllm":
            longest = dataclasses.replace(sampling, max_tokens=100_000)
            assert len(connections.critic.complete([chat], longest)[0]) == 2, "no more is asked than there is room for"
            with pytest.raises(ValueError, match="the prompt is too long"):
                connections.critic.complete([(Message(role="user", content="9 " * 2000),)], sampling)
            os.kill(servers(run_dir)[0].pid, signal.SIGKILL)  # its element leaves, and another takes its place
            third = connections.critic.complete([chat], sampling)[0]
            assert [item.token_ids for item in third] == [item.token_ids for item in second], "it loads what it missed"
        connections.close()
    deadline = time.monotonic() + 20
    while servers(run_dir):
        assert time.monotonic() < deadline


def servers(run_dir: Path) -> list[psutil.Process]:
    """The stand-ins that serve a run's critic."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if str(STANDIN) in words and str(run_dir / "critic") in words:
            found.append(process)
    return found
