"""Where rank 0 has its rollouts from: the services of the run, or a recording; made in time or one step ahead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import Connections, connect
from ctrl_hpc.config import Config
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.train.experience import Experience, Rollout, record_file
from ctrl_hpc.train.pool import DraftPool

COLUMNS = ["step", "solution_id", "critique", "judgement", "draft_accepted", "revision", "status", "reward", "reason"]
"""Of the table of samples."""
KEPT = 2
"""Newest published weights kept: a server may still be reading those before the last."""


@dataclass(slots=True, kw_only=True)
class Source:
    """The services (None when rollouts are replayed) and what is asked of them."""

    config: Config
    folder: Path
    """Where rollouts are recorded."""
    pool: DraftPool | None
    connections: Connections | None
    prompts: Prompts
    version: int = 0
    """Of the weights that the critic's servers hold."""
    _thread: ThreadPoolExecutor | None = None
    _pending: tuple[int, Future[Experience]] | None = None

    @classmethod
    def open(cls, config: Config, run_dir: Path) -> Source:
        """Connect to the services of the run. Raises ValueError when there is no draft to critique."""
        from transformers import AutoTokenizer

        folder, prompts = run_dir / "rl" / "rollouts", Prompts.load(config.prompts.folder, config.prompts.system)
        if config.rl.replay is not None:
            return cls(config=config, folder=folder, pool=None, connections=None, prompts=prompts)
        pool = DraftPool.load(run_dir, config.seed)
        # An input is a token shorter than its sequence.
        room = config.trainer.micro_batch_tokens + 1 - config.rl.max_tokens
        limit = min(room, config.rl.max_prompt_tokens or room)
        pool = pool.fitting(prompts, AutoTokenizer.from_pretrained(run_dir / "sft" / "hf"), limit)
        connections = connect(config, run_dir, [problem for problem, _ in pool.pairs])
        thread = ThreadPoolExecutor(1, "rollouts") if config.rl.max_staleness else None
        return cls(config=config, folder=folder, pool=pool, connections=connections, prompts=prompts, _thread=thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self.connections is not None:
            self.connections.close()

    def experience(self, collect: Callable[[Source, int, int], Experience], step: int, position: int) -> Experience:
        """The experience of a step; with ``rl.max_staleness=1`` the next step's is begun at once."""
        if self._thread is None:
            return collect(self, step, position)
        if self._pending is not None and self._pending[0] == step:
            ready = self._pending[1].result()
        else:
            ready = collect(self, step, position)
        if step + 1 < self.config.rl.steps:
            self._pending = (step + 1, self._thread.submit(collect, self, step + 1, ready.position))
        return ready

    def publish(self, weights: Path, version: int) -> None:
        """Let the critic's servers load ``weights``, after the rollouts in flight; remove older ones."""
        if self._pending is not None:
            self._pending[1].result()
        if self.connections is not None:
            self.connections.critic.update_weights(str(weights), version)
        self.version = version
        for old in sorted(path for path in weights.parent.iterdir() if path.name.startswith("v"))[:-KEPT]:
            shutil.rmtree(old)

    def samples(self, step: int, count: int) -> list[list[Any]]:
        """Rows of ``COLUMNS``: some rollouts of a step, for people to read."""
        file = record_file(self.folder, step)
        if not file.exists():
            return []
        return [[step, *(getattr(item, name) for name in COLUMNS[1:])] for item in jsonl.read(Rollout, file)[:count]]
