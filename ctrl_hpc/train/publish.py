"""Versions of the critic's weights, written for its servers to load while the trainer goes on."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch.distributed as dist
from torch import Tensor

from ctrl_hpc.megatron import export, lora, weights
from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.train.ahead import weights_folder
from ctrl_hpc.train.policy import Policy


class Reader(Protocol):
    """Who waits for versions, on rank 0."""

    def publish(self, version: int) -> None:
        """The version is there."""

    def fail(self, error: Exception) -> None:
        """It could not be written."""


class Publisher:
    """Writes versions of the critic's weights; every rank takes part, with what it gathered.

    The trainer waits until the weights are copied to the host, and for the version before; they are written, and told
    to the ``reader``, by a thread. A context manager: what is left is written at its end, unless that is an error.
    """

    def __init__(self, policy: Policy, stage: Path, sft: Path) -> None:
        self._policy, self._stage, self._sft = policy, stage, sft
        self._last: tuple[int, About] | None = None
        self._since_whole = 0
        self._previous: dict[str, Tensor] = {}
        """This rank's part of the tensors, as they were published last."""
        # a version that the next one is a difference to stays as it is while that is copied
        self._copies = [weights.Copies() for _ in range(2 if policy.config.rl.publish == "delta" else 1)]
        self._writing: _Writing | None = None
        # of its own: the trainer's collectives go on meanwhile
        patience = timedelta(seconds=policy.config.trainer.timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=patience) if policy.world.size > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self.wait()

    def wait(self) -> None:
        """Return when the last version is written. Raises what its writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def publish(self, version: int, reader: Reader | None = None) -> None:
        """Publish the weights as they are: whole, as the difference to the last published version, or the adapters.

        Raises what the writing of the last one raised.
        """
        self.wait()
        self._copies.reverse()
        policy = self._policy
        parts = weights.gather(
            policy.model,
            policy.architecture,
            policy.world,
            spread=True,
            adapters=self._policy.config.publishes_adapters_alone,
            copies=self._copies[0],
        )
        mine = dict(parts)
        self._writing = _Writing(self._writer(mine, version), version, reader)

    def _writer(self, mine: dict[str, Tensor], version: int) -> Callable[[], None]:
        """What writes a version. What the next one is a difference to is known when it ends."""
        options, world = self._policy.config.rl, self._policy.world
        folder = weights_folder(self._stage, version)
        to = (mine.items(), world, folder)
        if self._policy.config.publishes_adapters_alone:
            config = self._policy.config.lora
            return partial(lora.write, mine, world, folder, config=config, base=self._policy.folder, group=self._group)
        whole = partial(export.write, *to, source=self._sft, link=True, group=self._group)
        if options.publish == "full":
            return whole
        about, before = About(state=secrets.token_hex(16)), self._last
        self._last = (version, about)
        if before is None or self._since_whole + 1 >= options.publish_full_every:
            self._since_whole, self._previous = 0, mine
            return partial(whole, about=about)
        self._since_whole += 1
        about = replace(about, base=weights_folder(self._stage, before[0]).name, base_state=before[1].state)
        return partial(export.write_difference, *to, about=about, previous=self._previous, group=self._group)


class _Writing:
    """A version that a thread writes; a daemon, so that a trainer that must end does not wait for a hanging disk."""

    def __init__(self, write: Callable[[], None], version: int, reader: Reader | None) -> None:
        self._write, self._version, self._reader = write, version, reader
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"publish-{version}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
            if self._reader is not None:
                self._reader.publish(self._version)
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error
            if self._reader is not None:
                self._reader.fail(error)

    def finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
