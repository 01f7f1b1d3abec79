"""What the machines of a run do in a second: given in the configuration, measured on this site, or assumed.

``ctrl-hpc bench rates --out FILE`` measures; ``plan.rates=FILE`` uses what it found.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctrl_hpc.config import Config, PlanConfig

Source = Literal["given", "measured", "assumed"]
_ASSUMED = {
    "trainer_tflops": {"cuda": 0.4 * 989.0, "cpu": 0.04},
    "rollout_tokens_per_s": {"cuda": 3000.0, "cpu": 8000.0},
    "executor_tests_per_s": {"cuda": 40.0, "cpu": 40.0},
    "disk_gb_per_s": {"cuda": 1.0, "cpu": 1.0},
}
"""Of a trainer's rank: 40 % of an H100's dense bf16 peak, one CPU core. Of one rollout server: a large model on a GPU,
the tiny one on a CPU. Of one jail: short tests. Of the run's disk, for one writer or reader."""
UNITS = {
    "trainer_tflops": "Tflop/s a rank",
    "rollout_tokens_per_s": "tokens/s a server",
    "executor_tests_per_s": "tests/s a jail",
    "disk_gb_per_s": "GB/s of disk",
}


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of :data:`UNITS`, and where it is from."""

    name: str
    value: float
    source: Source

    def __str__(self) -> str:
        return f"{self.value:.4g} {UNITS[self.name]}, {self.source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """All of them."""

    trainer_tflops: Rate
    rollout_tokens_per_s: Rate
    executor_tests_per_s: Rate
    disk_gb_per_s: Rate


def rates(config: Config, device: str) -> Rates:
    """What a configuration gives, else its file of measurements, else what is assumed of a ``device``.

    Raises ValueError for a file that is none.
    """
    options = config.plan
    measured = {} if options.rates is None else read(Path(options.rates))
    given = {name: getattr(options, name, None) for name in UNITS}
    if options.executor_runs_per_s is not None:
        given["executor_tests_per_s"] = options.executor_runs_per_s * options.tests_per_program
    return Rates(**{name: _rate(name, given[name], measured.get(name), device) for name in UNITS})


def _rate(name: str, given: float | None, measured: float | None, device: str) -> Rate:
    if given is not None:
        return Rate(name, given, "given")
    if measured is not None:
        return Rate(name, measured, "measured")
    return Rate(name, _ASSUMED[name][device], "assumed")


def read(file: Path) -> dict[str, float]:
    """A file of measured rates. Raises ValueError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"plan.rates: {file}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"plan.rates: {file}: must map rates to numbers")
    for name, value in found.items():
        if name not in UNITS:
            raise ValueError(f"plan.rates: {file}: {name}: unknown; allowed: {', '.join(UNITS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"plan.rates: {file}: {name}: {value!r}: must be a number greater than 0")
    return found


def runs_per_s(options: PlanConfig, rates: Rates) -> float:
    """Programs that one jail runs in a second."""
    return rates.executor_tests_per_s.value / options.tests_per_program
