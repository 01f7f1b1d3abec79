"""Rollouts made ahead of the trainer, by a bounded number of weight versions (prime-rl's async level)."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import Connections, connect
from ctrl_hpc.config import Config
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.train import rollouts
from ctrl_hpc.train.drafts import DraftPool
from ctrl_hpc.train.rollouts import Experience, Rollout, record_file
from ctrl_hpc.train.validation import Validation, problems_of

type Make = Callable[[int, int, int], Experience]
"""Makes the experience of a step, from drafts at a position on, by critics of a version."""


class Producer:
    """Makes the experience of one step after the other, in a thread of its own, while the trainer updates.

    Step v updates version v of the weights. The rollouts of step s begin when those of step s - 1 are made and version
    s - K is published, K being ``max_staleness``; all of them are made by the newest version that there was at the end
    of step s - 1's, or by version s - K where that is newer. So K = 0 is strictly on-policy, with K = 1 a step has the
    version before its own whatever the timing, and with more never an older one than s - K, and a newer one where the
    rollouts are what takes long. A stage that continues at step c begins with version c.
    """

    def __init__(self, make: Make, *, start: int, steps: int, position: int, max_staleness: int) -> None:
        """Begin at step ``start``, whose version is published, with drafts at ``position``."""
        self._make, self._steps, self._max_staleness = make, steps, max_staleness
        self._published = self._seen = start
        self._position = position
        self._next = start
        self._made: deque[tuple[int, Future[Experience]]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._submit()

    def publish(self, version: int) -> None:
        """Version ``version`` can be used: one more step may begin. Does not wait for anything."""
        self._published = version
        self._submit()

    def take(self, step: int) -> Experience:
        """The experience of a step, once it is made.

        Raises what its making raised; and at once what went wrong with a later step.
        """
        for _, made in self._made:
            if made.done():
                made.result()
        number, made = self._made.popleft()
        assert number == step, f"the experience of step {number} is next, not of step {step}"
        return made.result()

    def close(self) -> None:
        """Begin no further step. The one in hand ends when its services' clients are closed."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        while self._next < min(self._steps, self._published + self._max_staleness + 1):
            self._made.append((self._next, self._thread.submit(self._produce, self._next)))
            self._next += 1

    def _produce(self, step: int) -> Experience:
        """In the thread, which takes the steps in order."""
        experience = self._make(step, self._position, max(self._seen, step - self._max_staleness))
        self._position = experience.position
        # before the trainer has this step: no timing can make a later version of it
        self._seen = self._published
        return experience


@dataclass(slots=True, kw_only=True)
class Source:
    """The services (None when rollouts are replayed) and what is asked of them."""

    config: Config
    folder: Path
    """Where rollouts are recorded."""
    pool: DraftPool | None
    connections: Connections | None
    prompts: Prompts
    validation: Validation | None = None
    version: int = 0
    """Of the weights that the critic's servers hold, or are about to: older ones are asked for no more."""
    _producer: Producer | None = None

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
        validated = problems_of(config, run_dir)
        problems = [problem for problem, _ in pool.pairs] + [item for items in validated.values() for item in items]
        connections = connect(config, run_dir, problems)
        validation = None
        if validated:
            place = folder.parent / "validation"
            validation = Validation(
                config=config, folder=place, connections=connections, prompts=prompts, problems=validated
            )
        return cls(
            config=config,
            folder=folder,
            pool=pool,
            connections=connections,
            prompts=prompts,
            validation=validation,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End what is being made, too: its requests are given up."""
        if self._producer is not None:
            self._producer.close()
        if self.connections is not None:
            self.connections.close()

    def experience(self, make: Callable[[Source, int, int, int], Experience], step: int, position: int) -> Experience:
        """The experience of a step, made as :class:`~ctrl_hpc.train.ahead.Producer` says.

        The first call says where the stage begins; ``position`` of the later ones is where their rollouts began.
        """
        options = self.config.rl
        if self._producer is None:
            self._producer = Producer(
                partial(make, self),
                start=step,
                steps=options.steps,
                position=position,
                max_staleness=options.max_staleness,
            )
        experience = self._producer.take(step)
        stale = experience.metrics["rl/staleness"]
        assert options.replay is not None or 0 <= stale <= options.max_staleness, f"step {step}: {stale} versions old"
        return experience

    def publish(self, weights: Path, version: int) -> None:
        """Say that ``weights`` are there; remove those that no server will be asked to load. Does not wait.

        Kept are at most ``rl.max_staleness`` + 2 versions: from the one that the servers hold on.
        """
        if self._producer is None:
            self.version = version
        for folder in weights.parent.glob("v*"):
            # newer ones are an earlier start's, which got further than the checkpoint that this one continues from
            if not self.version <= int(folder.name[1:]) <= version:
                shutil.rmtree(folder)
        if self._producer is not None:
            self._producer.publish(version)

    def load(self, version: int) -> None:
        """Let the critic's servers load a published version, between two steps' rollouts.

        A server that is lost and comes back, or joins, loads the same before it is asked.
        """
        self.version = version
        if self.connections is not None:
            self.connections.critic.update_weights(str(weights_folder(self.folder.parent, version)), version)

    def samples(self, step: int, count: int) -> list[list[rollouts.Cell]]:
        """Rows of ``samples.COLUMNS``: some rollouts of a step, for people to read."""
        file = record_file(self.folder, step)
        if not file.exists():
            return []
        drafts = {} if self.pool is None else {pair[1].id: pair for pair in self.pool.pairs}
        return rollouts.rows(step, jsonl.read(Rollout, file)[:count], drafts)


def weights_folder(folder: Path, version: int) -> Path:
    """Where a version of the critic's weights is published, in the stage's folder."""
    return folder / "weights" / f"v{version:06d}"
