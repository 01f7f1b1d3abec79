"""A training stage's loop over its steps: resumed from the last checkpoint, logged, saved, and stopped in time."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ctrl_hpc.config import Config, OptimizerConfig
from ctrl_hpc.megatron import checkpoint, parallel_state
from ctrl_hpc.run.journal import Artifact, Journal, Table
from ctrl_hpc.train.policy import Policy


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then the decay towards ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * share


_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Interruption:
    """While entered, SIGTERM and SIGUSR2 are noted instead of obeyed, for the step in hand to end and be saved.

    ``requested`` is also true when less is left until ``SLURM_JOB_END_TIME`` than the longest step and the longest
    save took so far, with half as much again.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._longest: dict[str, float] = {}
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def measured(self, what: str, seconds: float) -> None:
        """``step`` or ``save`` took this long."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    @property
    def requested(self) -> bool:
        """Whether to save now and stop."""
        out_of_time = self._end is not None and time.time() + 1.5 * sum(self._longest.values()) > self._end
        return self._signal is not None or out_of_time

    def obey(self, step: int) -> None:
        """After the save: hand the signal to whoever would have had it (submitit requeues the job), or just stop.

        Raises RuntimeError when the process is still alive after that.
        """
        number = self._signal if self._signal is not None else signal.SIGUSR2
        self.__exit__()
        if self._signal is not None or callable(self._before.get(number)):
            os.kill(os.getpid(), number)
        raise RuntimeError(f"stopped before the end: saved after step {step}; a rerun continues there")


class Clock:
    """Seconds spent in the phases of a step. Threads may share it: a phase that several are in is counted once.

    Beside them when each began first and ended last (``began_PHASE``, ``ended_PHASE``, in seconds of the day's clock),
    which the run's timeline is drawn from.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inside: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._spans: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block under ``time/PHASE_s``."""
        key = f"time/{phase}_s"
        with self._lock:
            self._inside[key] = self._inside.get(key, 0) + 1
            if self._inside[key] == 1:
                self._since[key] = time.perf_counter()
                self._spans.setdefault(f"began_{phase}", time.time())
        try:
            yield
        finally:
            with self._lock:
                self._inside[key] -= 1
                if self._inside[key] == 0:
                    self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - self._since[key]
                    self._spans[f"ended_{phase}"] = time.time()

    def take(self) -> dict[str, float]:
        """The seconds since the last call, of phases that are over."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
            over = [name for name in self._spans if f"time/{name.partition('_')[2]}_s" in taken]
            return taken | {name: self._spans.pop(name) for name in over}


class Loop:
    """Iterate over it for the steps that are left; call :meth:`done` at the end of each.

    ``progress`` is what a checkpoint remembers beside weights, optimizer and random state: the steps done, and
    whatever the stage adds. A checkpoint is written every ``save_every`` steps, at the last one, and
    when the job is told to stop; all but those two may be written during the step that follows (``trainer.save``).
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        stage: str,
        parts: Mapping[str, Policy],
        *,
        steps: int,
        save_every: int,
        **progress: Any,
    ) -> None:
        """Load the newest checkpoint into ``parts`` (``policy`` is always there); ``progress`` begins a fresh run.

        Raises ValueError when the checkpoint does not fit.
        """
        policy = parts["policy"]
        world = policy.world
        self.folder, self.steps = run_dir / stage, steps
        self._config, self._policy, self._save_every = config, policy, save_every
        self._parts = {name: (part.model, part.optimizer) for name, part in parts.items() if part.optimizer is not None}
        saved = checkpoint.load(self.folder / "checkpoints", self._parts, world)
        fresh = {"step": 0, **progress}
        self.progress: dict[str, Any] = saved or fresh
        self.start = int(self.progress["step"])
        self.clock = Clock()
        self._journal = Journal(run_dir, stage, start=self.start) if world.main else None
        self._engine = policy.engine()
        if world.main:
            told = ", ".join(f"{name} {word}" for name, word in self._engine.items())
            print(f"{stage}: from step {self.start} of {steps}; {told}", flush=True)
        self._interruption = Interruption()
        self._in_background = config.trainer.save == "async" or (
            config.trainer.save == "auto" and world.device.type == "cuda"
        )
        self._pending: checkpoint.Pending | None = None
        self._begin_s = 0.0
        self._began = 0.0

    def __enter__(self) -> Self:
        self._interruption.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._interruption.__exit__(*exception)

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.steps):
            self._began = time.perf_counter()
            parallel_state.watch(self._config.trainer.timeout_s)
            yield step

    def done(
        self, step: int, metrics: dict[str, float], tables: Callable[[], Mapping[str, Table]] = dict, **progress: Any
    ) -> None:
        """Step ``step`` is done: save where it is due, and journal it, with ``tables`` where it is saved.

        When the job was told to stop, this does not return.
        """
        self._interruption.measured("step", time.perf_counter() - self._began)
        stop = self._policy.world.from_main(lambda: self._interruption.requested)
        self.progress |= {"step": step + 1, **progress}
        last = stop or step + 1 == self.steps
        saving = last or (step + 1) % self._save_every == 0
        with self.clock("save"):
            self._finish_save()
            if saving:
                self._save(wait=last or not self._in_background)
        times = self.clock.take()
        self._interruption.measured("save", times.get("time/save_s", 0.0))
        times["time/step_s"] = time.perf_counter() - self._began
        backend = {"kernels/triton": float(self._policy.kernels == "triton")}
        if self._journal is not None:
            self._log(self._journal, step, metrics | times | backend, tables() if saving else {})
        if stop and step + 1 < self.steps:
            self._interruption.obey(step)
        if saving and not last and self._config.wandb.checkpoints == "all" and self._config.wandb.mode != "disabled":
            self._keep(step + 1)

    def _log(self, journal: Journal, step: int, metrics: dict[str, float], tables: Mapping[str, Table]) -> None:
        """The step's line; the first one of a start tells what computes, too, and the one after a save what was kept"""
        kept = self._kept(step)
        name = f"{self._config.name}-{self.folder.name}"
        journal.log(
            step,
            metrics,
            tables=tables,
            artifacts=[Artifact(name=name, type="model", path=kept)] if kept.is_dir() else [],
            summary={f"trainer/{part}": word for part, word in self._engine.items()} if step == self.start else {},
            steps=self.steps,
        )

    def _kept(self, step: int) -> Path:
        return self.folder / "kept" / f"step-{step:06d}"

    def _keep(self, step: int) -> None:
        """The critic after so many steps, as an artifact of the next one; it stays, for the sync to send."""
        self._finish_save()  # a run that continues does not do this step, and so not this folder, again
        self._policy.export(self._kept(step), source=self._policy.folder, link=True)

    def _finish_save(self) -> None:
        """The save that was begun at an earlier step ends here: it had a step's time."""
        if self._pending is None:
            return
        started = time.perf_counter()
        self._pending.finish()
        # The last save is not in the background: it will take all of this.
        whole_s = self._begin_s + self._pending.write_s + time.perf_counter() - started
        self._interruption.measured("save", whole_s)
        self._pending = None

    def _save(self, *, wait: bool) -> None:
        started = time.perf_counter()
        begun = (checkpoint.save if wait else checkpoint.begin)(
            self.folder / "checkpoints",
            int(self.progress["step"]),
            self._parts,
            self._policy.world,
            self.progress,
            keep=self._config.trainer.keep_checkpoints,
            source=self._policy.folder,
        )
        self._pending = begun if isinstance(begun, checkpoint.Pending) else None
        self._begin_s = time.perf_counter() - started
