"""What a node and the service on it do, into a journal: CPU, memory, GPUs, and the rates of the service's ``/metrics``.

The step of a line is the time of day, so that a later start of an element comes after this one.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any, Self
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import pynvml

from ctrl_hpc.records import EVALUATION
from ctrl_hpc.run.journal import Journal

_RATES = {
    "executor_runs_total": "executor/runs_per_s",
    "executor_cache_hits_total": "executor/cache_hits_per_s",
    "ctrl_rollout_completion_tokens_total": "rollout/tokens_per_s",
    "ctrl_rollout_requests_total": "rollout/requests_per_s",
    "ctrl_rollout_busy_seconds_total": "rollout/busy",
}
"""Counters of the services, told as what they grow by a second."""
_LEVELS = {
    "executor_queue_length": "executor/queue",
    "ctrl_rollout_waiting": "rollout/queue",
    "ctrl_rollout_weight_version": "rollout/weight_version",
}
"""Gauges, told as they are."""
_SAMPLE = re.compile(r"^([a-z_]+) ([0-9.eE+-]+)$", re.MULTILINE)
direct = build_opener(ProxyHandler({}))
"""Opens the URLs of services, past any proxy."""


def read(text: str) -> dict[str, float]:
    """The samples without labels of Prometheus' text format."""
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


def rates(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """What is told of a service, from two readings so many seconds apart."""
    out = {told: (after[name] - before.get(name, 0.0)) / seconds for name, told in _RATES.items() if name in after}
    levels = {told: after[name] for name, told in _LEVELS.items() if name in after}
    if levels.get("rollout/weight_version", 0.0) >= EVALUATION:  # would dwarf those of training
        del levels["rollout/weight_version"]
    return out | levels


class _NodeFigures:
    """This node's figures: CPU and memory; GPUs by NVML, where there is a driver."""

    def __init__(self) -> None:
        self._gpus: list[Any] = []
        psutil.cpu_percent()  # since here is what the next call tells
        try:
            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            return  # no driver here, or one that is out of order

    def figures(self) -> dict[str, float]:
        """Percent of all cores since the last call and of the memory; of every GPU its use in percent, and GiB."""
        memory = psutil.virtual_memory()
        out = {"node/cpu_percent": psutil.cpu_percent(), "node/memory_percent": memory.percent}
        out["node/memory_gib"] = (memory.total - memory.available) / 2**30
        for index, gpu in enumerate(self._gpus):
            try:
                out[f"node/gpu{index}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
                out[f"node/gpu{index}_memory_gib"] = pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30
            except pynvml.NVMLError:
                continue  # a part of a GPU (MIG) tells not all of it
        return out


class Monitor:
    """Journals a node, and the service at ``url`` on it, every ``every_s`` until closed."""

    def __init__(
        self, run_dir: str | Path, role: str, element: int, every_s: float, url: str = "", token: str | None = None
    ) -> None:
        self._about = (run_dir, role, element)
        self._every_s, self._url = every_s, f"{url}/metrics" if url else ""
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Journal once more, what is due, and end."""
        self._closed.set()
        self._thread.join()

    def _follow(self) -> None:
        node, before, when = _NodeFigures(), self._read(), time.monotonic()
        if self._closed.wait(self._every_s):
            return
        journal = Journal(*self._about)
        ended = False
        while not ended:
            now, at = self._read(), time.monotonic()
            told = rates(before, now, at - when) if now else {}
            before, when = (now, at) if now else (before, when)
            try:
                journal.log(max(int(time.time()), journal.next), told | node.figures())
            except OSError as error:  # a full disk, for which the run waits
                print(f"monitor: figures of this look are left out: {error}", flush=True)
            ended = self._closed.wait(self._every_s)

    def _read(self) -> dict[str, float]:
        if not self._url:
            return {}
        try:
            with direct.open(Request(self._url, headers=self._headers), timeout=5.0) as answer:
                return read(answer.read().decode())
        except OSError:  # it is too busy, or ending: the next reading counts for this one too
            return {}
