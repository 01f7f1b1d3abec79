"""The wandb run of an array element: how much its service does, read from its own ``/metrics``."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Self
from urllib.request import ProxyHandler, Request, build_opener

from ctrl_hpc.config import Config
from ctrl_hpc.records import EVALUATION
from ctrl_hpc.tracking import tracker as tracking

RATES = {
    "executor_runs_total": "executor/runs_per_s",
    "executor_cache_hits_total": "executor/cache_hits_per_s",
    "ctrl_rollout_completion_tokens_total": "rollout/tokens_per_s",
    "ctrl_rollout_requests_total": "rollout/requests_per_s",
    "ctrl_rollout_busy_seconds_total": "rollout/busy",
}
"""Counters of the services, logged as what they grow by a second."""
LEVELS = {
    "executor_queue_length": "executor/queue",
    "ctrl_rollout_waiting": "rollout/queue",
    "ctrl_rollout_weight_version": "rollout/weight_version",
}
"""Gauges, logged as they are."""
_SAMPLE = re.compile(r"^([a-z_]+) ([0-9.eE+-]+)$", re.MULTILINE)
direct = build_opener(ProxyHandler({}))
"""Opens the URLs of services, past any proxy."""


def read(text: str) -> dict[str, float]:
    """The samples without labels of Prometheus' text format."""
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


def rates(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """What is logged, from two readings so many seconds apart."""
    out = {logged: (after[name] - before.get(name, 0.0)) / seconds for name, logged in RATES.items() if name in after}
    levels = {logged: after[name] for name, logged in LEVELS.items() if name in after}
    if levels.get("rollout/weight_version", 0.0) >= EVALUATION:  # would dwarf those of training
        del levels["rollout/weight_version"]
    return out | levels


class ServiceLog:
    """Logs a service every ``wandb.services_every_s`` until closed; wandb starts with the first of them."""

    def __init__(self, config: Config, run_dir: str, role: str, element: int, url: str, token: str | None) -> None:
        self._config, self._run_dir, self._role, self._element = config, run_dir, role, element
        self._url = f"{url}/metrics"
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._log, name="service-log", daemon=True)

    def start(self) -> Self:
        """Begin, unless wandb is not wanted for services."""
        if self._config.wandb.services and self._config.wandb.mode != "disabled":
            self._thread.start()
        return self

    def close(self) -> None:
        """Log no more; what was logged is on disk."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _log(self) -> None:
        every_s = self._config.wandb.services_every_s
        before, when = self._read(), time.monotonic()
        if self._closed.wait(every_s):
            return
        with tracking.Tracker(self._config, Path(self._run_dir), self._role, self._element) as tracker:
            ended = False
            while not ended:
                now, at = self._read(), time.monotonic()
                if now:
                    # the axis is the time of day, so that a later start of the element comes after this one
                    tracker.log(rates(before, now, at - when), int(time.time()))
                    before, when = now, at
                ended = self._closed.wait(every_s)

    def _read(self) -> dict[str, float]:
        try:
            with direct.open(Request(self._url, headers=self._headers), timeout=5.0) as answer:
                return read(answer.read().decode())
        except OSError:  # it is too busy, or ending: the next reading counts for this one too
            return {}
