"""Rollouts ahead of the trainer: which version makes them, whatever takes long; errors, ends, weights that are kept."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.config import Config, RLConfig
from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.service.fleet import LoopThread
from ctrl_hpc.train import publish
from ctrl_hpc.train.ahead import Ahead, weights_folder
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.collect import Collector
from ctrl_hpc.train.drafts import side_by_side
from ctrl_hpc.train.loop import Clock
from ctrl_hpc.train.rollouts import Experience

DRAFTS = 4
"""Drawn for a step."""


def experience(step: int, version: int, position: int) -> Experience:
    one = torch.ones(1)
    metrics = {"step": step, "rl/staleness": float(step - version)}
    batch = collate([((1,), (2,))])
    return Experience(
        batch=batch, rewards_S=one, groups_S=one, valid_S=one, rollout_SR=one, position=position, metrics=metrics
    )


class Trainer:
    """A trainer and its rollouts, in an order that is prescribed: nothing here depends on how fast a thread is.

    ``after[s]``: the version that must be published before the rollouts of step s end. A version is published when all
    rollouts have ended that can end without it.
    """

    def __init__(self, after: list[int], max_staleness: int, start: int = 0) -> None:
        self.start, self.after, self.max_staleness = start, after, max_staleness
        self.published = {version: threading.Event() for version in range(start, start + len(after) + 1)}
        self.versions: list[int] = []
        self.positions: list[int] = []

    def make(self, step: int, position: int, version: int) -> Experience:
        self.versions.append(version)
        self.positions.append(position)
        assert self.published[self.after[step - self.start]].wait(timeout=60)
        return experience(step, version, position + DRAFTS)

    def run(self, position: int = 0) -> list[int]:
        """The versions of all steps' rollouts."""
        steps = range(self.start, self.start + len(self.after))
        self.published[self.start].set()
        ahead = Ahead(
            self.make,
            Path("unused"),
            start=self.start,
            steps=steps.stop,
            position=position,
            max_staleness=self.max_staleness,
        )
        for step in steps:
            assert ahead.take(step).metrics["step"] == step
            for number, made in ahead._made:
                if self._can_end(number - self.start, step):
                    made.result(timeout=60)
            ahead.publish(step + 1)
            self.published[step + 1].set()
        ahead.close()
        return self.versions

    def _can_end(self, index: int, newest: int) -> bool:
        return max(self.after[: index + 1]) <= newest


@pytest.mark.parametrize(
    ("max_staleness", "versions"),
    [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 2, 3]), (3, [0, 0, 0, 0, 1, 2])],
)
def test_a_slow_trainer_finds_rollouts_as_many_versions_old_as_is_allowed(
    max_staleness: int, versions: list[int]
) -> None:
    trainer = Trainer([0, 0, 0, 0, 0, 0] if max_staleness else [0, 1, 2, 3, 4, 5], max_staleness)
    assert trainer.run() == versions
    assert trainer.positions == [0, 4, 8, 12, 16, 20], "every draft once"


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_slow_rollouts_are_one_version_old_whatever_is_allowed(max_staleness: int) -> None:
    # the trainer waits for the rollouts of step s, with version s published: the next are begun with that one
    assert Trainer([0, 1, 2, 3, 4, 5], max_staleness).run() == [0, 0, 1, 2, 3, 4]


def test_a_stage_that_continues_begins_with_the_version_of_its_checkpoint() -> None:
    trainer = Trainer([5, 5, 5, 5], max_staleness=2, start=5)
    assert trainer.run(position=20) == [5, 5, 5, 6]
    assert trainer.positions == [20, 24, 28, 32]


@given(
    max_staleness=st.integers(0, 4), lags=st.lists(st.integers(0, 4), min_size=1, max_size=12), start=st.integers(0, 3)
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_no_timing_makes_a_rollout_older_than_allowed(max_staleness: int, lags: list[int], start: int) -> None:
    after = [max(start, start + index - min(lag, max_staleness)) for index, lag in enumerate(lags)]
    versions = Trainer(after, max_staleness, start).run()
    seen = [start, *(max(after[: index + 1]) for index in range(len(after)))]
    for index, version in enumerate(versions):
        step = start + index
        assert version == max(seen[index], step - max_staleness)
        assert step - max_staleness <= version <= step
        assert max_staleness != 1 or version == max(start, step - 1), "one ahead is the same whatever the timing"


def test_what_went_wrong_ahead_is_told_at_once() -> None:
    begun = threading.Event()

    def make(step: int, position: int, version: int) -> Experience:
        if step == 2:
            begun.set()
            raise ValueError("no critic server has been alive for 600 s")
        return experience(step, version, position)

    ahead = Ahead(make, Path("unused"), start=0, steps=9, position=0, max_staleness=2)
    ahead.take(0)
    assert begun.wait(timeout=60)
    ahead._made[-1][1].exception(timeout=60)
    with pytest.raises(ValueError, match="alive for 600 s"):
        ahead.take(1)  # which is made
    ahead.close()


def test_a_trainer_that_ends_does_not_wait_for_rollouts_in_flight() -> None:
    client, asked = LoopThread("services"), threading.Event()

    async def silent() -> None:
        asked.set()
        await asyncio.Event().wait()

    def make(step: int, position: int, version: int) -> Experience:
        client.run(silent())
        raise AssertionError("it does not answer")

    ahead = Ahead(make, Path("unused"), start=0, steps=9, position=0, max_staleness=3)
    in_hand, later = ahead._made[0][1], ahead._made[1][1]
    assert asked.wait(timeout=60)
    ahead.close()
    client.close()
    with pytest.raises(CancelledError):
        in_hand.result(timeout=60)
    assert later.cancelled()
    for thread in ahead._thread._threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "the interpreter waits for it at its end"
    with pytest.raises(RuntimeError, match="services is closed"):
        client.run(silent())
    client.close()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_weights_are_kept_as_long_as_a_server_may_load_them(tmp_path: Path, max_staleness: int) -> None:
    stage, loaded = tmp_path / "rl", []

    def update_weights(folder: str, version: int) -> int:
        assert Path(folder) == weights_folder(stage, version) and Path(folder).is_dir()
        loaded.append(version)
        return 1

    services: Any = SimpleNamespace(critic=SimpleNamespace(update_weights=update_weights), close=lambda: None)
    config, prompts = Config(name="test", rl=RLConfig(steps=12, max_staleness=max_staleness)), cast(Any, None)
    collector = Collector(config=config, stage=stage, prompts=prompts, connections=services)

    def make(step: int, position: int, version: int) -> Experience:
        collector.load(version)
        return experience(step, version, position + DRAFTS)

    def published() -> list[int]:
        return sorted(int(folder.name[1:]) for folder in (stage / "weights").iterdir())

    for version in (4, 5, 6, 7, 8):  # an earlier start got further than the checkpoint at 5, and was killed
        weights_folder(stage, version).mkdir(parents=True)
    with Ahead(make, stage, start=5, steps=12, position=20, max_staleness=max_staleness) as ahead:
        assert published() == [5]
        for step in range(5, 12):
            ahead.take(step)
            weights_folder(stage, step + 1).mkdir()
            ahead.publish(step + 1)
            kept = published()
            assert kept[-1] == step + 1 and kept == list(range(kept[0], step + 2))
            assert len(kept) <= max_staleness + 2 and kept[0] <= loaded[-1]
    assert loaded[0] == 5 and len(loaded) == 7 and all(0 <= 5 + i - v <= max_staleness for i, v in enumerate(loaded))


def test_versions_stay_as_long_as_later_ones_are_differences_to_them(tmp_path: Path) -> None:
    def publish(version: int) -> None:
        folder = weights_folder(tmp_path, version)
        folder.mkdir(parents=True)
        base = None if version % 4 == 0 else f"v{version - 1:06d}"
        About(state=str(version), base=base, base_state=str(version - 1)).write(folder)

    publish(0)
    kept = []
    with Ahead(lambda step, at, version: experience(step, version, at), tmp_path, start=0, steps=9, position=0,
               max_staleness=0) as ahead:  # fmt: skip
        for step in range(9):
            ahead.take(step)
            publish(step + 1)
            ahead.publish(step + 1)
            kept.append(sorted(int(folder.name[1:]) for folder in (tmp_path / "weights").iterdir()))
    assert kept[2] == [0, 1, 2, 3] and kept[6] == [4, 5, 6, 7]


def test_a_step_waits_for_a_version_that_another_thread_writes_and_is_told_when_it_cannot_be(tmp_path: Path) -> None:
    with Ahead(lambda step, at, version: experience(step, version, at), tmp_path, start=0, steps=9, position=0,
               max_staleness=0) as ahead:  # fmt: skip
        ahead.take(0)
        writer = threading.Timer(0.1, ahead.publish, [1])
        writer.start()
        assert ahead.take(1).metrics["rl/staleness"] == 0
        writer = threading.Timer(0.1, ahead.fail, [OSError(28, "No space left on device")])
        writer.start()
        with pytest.raises(OSError, match="No space left"):
            ahead.take(2)
        ahead.publish(2)


def test_the_trainer_goes_on_while_a_version_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space, told = threading.Event(), cast(list[Any], [])
    reader = SimpleNamespace(publish=told.append, fail=lambda error: told.append(str(error)))

    def write(mine: object, world: object, folder: Path, **_: object) -> None:
        assert space.wait(timeout=60)
        if folder.name == "v000002":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.weights, "gather", lambda *_, **__: iter(()))
    monkeypatch.setattr(publish.export, "write", write)
    world, config = SimpleNamespace(size=1), Config(name="test")
    policy = SimpleNamespace(model=None, architecture=None, world=world, config=config)
    publisher = publish.Publisher(policy, tmp_path, tmp_path)  # type: ignore[arg-type]
    publisher.publish(1, reader)
    assert told == []  # and it is here
    space.set()
    publisher.publish(2, reader)
    with pytest.raises(OSError, match="No space left"):
        publisher.wait()
    assert told == [1, "[Errno 28] No space left on device"]
    publisher.publish(3, reader)
    publisher.wait()
    assert told[2:] == [3]


def test_chunks_are_in_order_and_the_first_error_ends_them() -> None:
    first_waits, second_done = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(timeout=60)
        second_done.set()
        return item * item

    assert side_by_side(work, range(5), 2) == [0, 1, 4, 9, 16]

    def fails(item: int) -> int:
        if item == 0:
            first_waits.wait(timeout=60)
            return 0
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(fails, range(3), 2)
    first_waits.set()


def test_a_phase_that_several_threads_are_in_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("ctrl_hpc.train.loop.time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock("revise"), clock("revise"):  # from 10 to 13, as two chunks would
        pass
    with clock("revise"):
        pass
    assert clock.take()["time/revise_s"] == 3.5
