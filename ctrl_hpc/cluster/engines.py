"""SGLang and vLLM as elements of the rollout arrays: their command lines, their start, their health, their end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ctrl_hpc.cluster import processes
from ctrl_hpc.cluster.monitor import direct
from ctrl_hpc.config import Config, RolloutConfig
from ctrl_hpc.service import http

_POLL_S = 0.5
_GRACE_S = 20.0
"""A server that is told to end gets so long."""


def sglang_command(rollout: RolloutConfig, model: str, host: str, port: int, secrets: Path) -> list[str]:
    """How SGLang is started; ``secrets`` is a file of its options that holds the token, which others must not see.

    The sampling values that a model's ``generation_config.json`` proposes are left out.
    """
    return [
        *(rollout.engine_command or (sys.executable, "-m", "sglang.launch_server")),
        *("--config", str(secrets)),
        *("--model-path", model, "--host", host, "--port", str(port)),
        *("--tensor-parallel-size", str(rollout.tensor), "--dtype", rollout.dtype),
        *("--sampling-defaults", "openai"),
        *rollout.engine_args,
    ]


def vllm_command(rollout: RolloutConfig, model: str, place: Path) -> list[str]:
    """How vLLM is started, listening on a socket file; its log-probabilities are of what is sampled from.

    The sampling values that a model's ``generation_config.json`` proposes are left out.
    """
    return [
        *(rollout.engine_command or ("vllm",)),
        *("serve", model, "--uds", str(place), "--served-model-name", model),
        *("--tensor-parallel-size", str(rollout.tensor), "--dtype", rollout.dtype),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *rollout.engine_args,
    ]


def serve(config: Config, model: str, token: str, on_ready: Callable[[str], None]) -> None:
    """Start the server of ``rollout.engine``, announce it when it is well, and stay as long as it does.

    Raises ValueError where it is not installed, RuntimeError when it ends by itself or does not come up in
    ``launch.start_timeout_s``. It ends with this process.
    """
    if not Path(model).is_dir():
        raise ValueError(f"no model folder {model}")
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-engine-") as folder:
        _ENGINES[config.rollout.engine](config, model, token, on_ready, Path(folder))


def _serve_sglang(config: Config, model: str, token: str, on_ready: Callable[[str], None], folder: Path) -> None:
    secrets = folder / "sglang.yaml"
    secrets.touch(mode=0o600)
    secrets.write_text(json.dumps({"api-key": token}), encoding="utf-8")
    host, port = config.launch.bind, http.free_port(config.launch.bind)
    if not config.rollout.engine_command and importlib.util.find_spec("sglang") is None:
        raise ValueError(
            f"rollout.engine: sglang is not installed in {sys.executable}; install it there, or name another "
            "interpreter's in rollout.engine_command"
        )
    with _Process(sglang_command(config.rollout, model, host, port, secrets)) as process:
        address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        process.await_health(lambda: _is_well(address), config.launch.start_timeout_s)
        on_ready(f"http://{host}:{port}")
        process.await_end()


def _serve_vllm(config: Config, model: str, token: str, on_ready: Callable[[str], None], folder: Path) -> None:
    from ctrl_hpc.rollout import vllm

    place = folder / "vllm.sock"
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # which has the routes for new weights
    with _Process(vllm_command(config.rollout, model, place), environment) as process:
        engine = vllm.Vllm(place, model)
        process.await_health(lambda: asyncio.run(engine.healthy()), config.launch.start_timeout_s)
        vllm.serve(place, model, host=config.launch.bind, on_ready=on_ready, token=token, lost=process.ended)
        if process.ended():
            process.await_end()


_ENGINES: dict[str, Callable[[Config, str, str, Callable[[str], None], Path], None]] = {
    "sglang": _serve_sglang,
    "vllm": _serve_vllm,
}


class _Process:
    """A server's process; a context manager that ends it, and all that it started."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        if shutil.which(command[0]) is None:
            raise ValueError(
                f"rollout.engine: {command[0]} is not installed on this node; install it, or name it in "
                "rollout.engine_command"
            )
        self._command = command
        print("starting", *command, flush=True)
        self._process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            preexec_fn=processes.die_with_parent,
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        processes.end([self._process.pid], grace_s=_GRACE_S)
        self._process.wait()

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def await_health(self, healthy: Callable[[], bool], timeout_s: float) -> None:
        """Return once it is well. Raises RuntimeError when it ends before, or takes too long."""
        began = time.monotonic()
        while not healthy():
            if self.ended():
                self.await_end()
            if time.monotonic() - began > timeout_s:
                raise RuntimeError(f"{self._command[0]}: not well after {timeout_s:.0f} s (launch.start_timeout_s)")
            time.sleep(_POLL_S)

    def await_end(self) -> None:
        """Stay as long as it runs. Raises RuntimeError then: it was not told to end."""
        code = self._process.wait()
        raise RuntimeError(f"{' '.join(self._command[:3])}...: ended by itself, exit code {code}; its words are above")


def _is_well(address: str) -> bool:
    try:
        with direct.open(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
