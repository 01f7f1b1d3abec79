"""Rollouts made ahead of the trainer, by a bounded number of weight versions (prime-rl's async level)."""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.train.rollouts import Experience

type Make = Callable[[int, int, int], Experience]
"""Makes the experience of a step, from drafts at a position on, by critics of a version."""


class Ahead:
    """Makes the experience of one step after the other, in a thread of its own, while the trainer updates.

    Step v updates version v of the weights. The rollouts of step s begin when those of step s - 1 are made and version
    s - K is published, K being ``max_staleness``; all of them are made by the newest version that there was at the end
    of step s - 1's, or by version s - K where that is newer. So K = 0 is strictly on-policy, with K = 1 a step has the
    version before its own whatever the timing, and with more never an older one than s - K, and a newer one where the
    rollouts are what takes long. A stage that continues at step c begins with version c.
    """

    def __init__(self, make: Make, stage: Path, *, start: int, steps: int, position: int, max_staleness: int) -> None:
        """Begin at step ``start``, whose version is published in the stage's folder, with drafts at ``position``."""
        self._make, self._stage, self._steps, self._max_staleness = make, stage, steps, max_staleness
        self._held = start
        """Version that servers hold, or are about to: older ones are asked for no more."""
        self._published = self._seen = start
        self._position = position
        self._next = start
        self._made: deque[tuple[int, Future[Experience]]] = deque()
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._remove_weights()
        self._submit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def publish(self, version: int) -> None:
        """Version ``version`` is there: one more step may begin. Does not wait for anything; for any thread.

        Weights that no server will be asked to load are removed; at most ``max_staleness`` + 2 versions are kept, and
        those that they are differences to.
        """
        with self._changed:
            if self._closed:
                return
            self._published = version
            self._submit()
            self._changed.notify_all()
        self._remove_weights()

    def fail(self, error: Exception) -> None:
        """There will be no further version."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self, step: int) -> Experience:
        """The experience of a step, once it is made; its version may still be on its way.

        Raises what its making raised; and at once what went wrong with a later step, or with publishing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error)
            if self._error is not None:
                raise self._error
            for _, made in self._made:
                if made.done():
                    made.result()
            number, made = self._made.popleft()
        assert number == step, f"the experience of step {number} is next, not of step {step}"
        return made.result()

    def close(self) -> None:
        """Begin no further step. The one in hand ends when its services' clients are closed."""
        with self._changed:
            self._closed = True
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        while self._next < min(self._steps, self._published + self._max_staleness + 1):
            self._made.append((self._next, self._thread.submit(self._produce, self._next)))
            self._next += 1

    def _produce(self, step: int) -> Experience:
        """In the thread, which takes the steps in order."""
        version = self._held = max(self._seen, step - self._max_staleness)
        assert version <= step, f"step {step}: version {version} is newer"
        experience = self._make(step, self._position, version)
        self._position = experience.position
        # before the trainer has this step: no timing can make a later version of it
        self._seen = self._published
        return experience

    def _remove_weights(self) -> None:
        oldest = _whole_before(self._stage, self._held)
        for folder in (self._stage / "weights").glob("v*"):
            # newer ones are an earlier start's, which got further than the checkpoint that this one continues from
            if not oldest <= int(folder.name[1:]) <= self._published:
                shutil.rmtree(folder)


def _whole_before(stage: Path, version: int) -> int:
    """The version that a server must begin with to come to another: itself, or the last whole one before."""
    while (about := About.read(weights_folder(stage, version))) is not None and about.base is not None:
        version = int(about.base[1:])
    return version


def weights_folder(stage: Path, version: int) -> Path:
    """Where a version of the critic's weights is published, in the stage's folder."""
    return stage / "weights" / f"v{version:06d}"
