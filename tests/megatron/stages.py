"""The stages SFT and RL in processes of one rank: whole, killed again and again, with services, with recordings.

``main`` runs every case in a child forked after the imports and writes FOLDER/stages.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.config import (
    Config,
    CriticConfig,
    LoraConfig,
    OptimizerConfig,
    PromptConfig,
    RLConfig,
    SFTConfig,
    TrainerConfig,
    WandbConfig,
)
from ctrl_hpc.records import Chat, Execution, Generation, Sampling, Verdict
from ctrl_hpc.train import collect, rl, sft
from ctrl_hpc.train.rollouts import Rollout

KILLS = (2, 7, 12, 18, 5, 3)
"""The file renames before which a run is killed, one after another: in saves, publications, recordings."""


RANDOM_KILLS = 6
"""Times a run is killed at a random one of its function calls."""


def config_of(folder: Path) -> Config:
    """A small SFT and RL on the model of ``folder``."""
    return Config(
        name="test",
        prompts=PromptConfig(folder="tiny"),
        critic=CriticConfig(model=str(folder / "critic")),
        trainer=TrainerConfig(device="cpu", micro_batch_tokens=512, timeout_s=120.0),
        sft=SFTConfig(epochs=2, batch_size=4, max_length=400, save_every=2, optimizer=OptimizerConfig(lr=3e-3)),
        rl=RLConfig(
            steps=8,
            prompts_per_step=4,
            group_size=4,
            minibatches=2,
            max_tokens=12,
            save_every=2,
            save_samples=2,
            replay=str(folder / "replay"),
            optimizer=OptimizerConfig(lr=1e-3, schedule="linear"),
        ),
        wandb=WandbConfig(mode="disabled"),
    )


def in_child(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a forked child; its wait status. A kill is what some children are for."""
    child = os.fork()
    if child == 0:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            try:
                work()
                code = 0
            except BaseException:  # noqa: BLE001 - the parent reads the log
                traceback.print_exc()
                code = 1
            out.flush()
        os._exit(code)
    return os.waitpid(child, 0)[1]


def killed_before_rename(number: int, work: Callable[[], None]) -> None:
    """Run ``work``, but die by SIGKILL before the ``number``-th rename of a file or folder."""
    rename, seen = os.replace, 0

    def counted(*names: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    os.replace = counted
    work()


class Services:
    """A critic, a generator and an executor that answer at once, and remember what they were told."""

    def __init__(self, folder: Path) -> None:
        self.published: list[tuple[str, int, bool]] = []
        self.version = 0
        self.generator = SimpleNamespace(complete=self.revise)
        self.executor = SimpleNamespace(run_many=self.execute)
        self.critic = SimpleNamespace(complete=self.critique, update_weights=self.update_weights)
        self.drawn: list[str] = []
        self.lock = threading.Lock()

    def critique(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """Half of each group says that the draft is right, half that it is wrong."""
        assert sampling.temperature == 1.0 and sampling.n == 4
        with self.lock:
            self.drawn += [chat[-1].content for chat in chats]
        return [[self._critique(j) for j in range(sampling.n)] for _ in chats]

    def _critique(self, j: int) -> Generation:
        judgement = "Correct" if j % 2 else "Incorrect"
        ids = (10 + j, 20, 30 + j % 2)
        return Generation(
            text=f"Overall judgment: {judgement}",
            prompt_ids=(1, 2, 3, 4),
            token_ids=ids,
            logprobs=(-5.0,) * len(ids),
            version=self.version,
        )

    def update_weights(self, folder: str, version: int) -> int:
        """Remember the version, and whether the weights were whole when they came."""
        whole = (Path(folder) / "model.safetensors").is_file() and (Path(folder) / "config.json").is_file()
        self.published.append((Path(folder).name, version, whole))
        self.version = version
        return 1

    def revise(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """Always the same wrong program."""
        assert sampling.temperature == 0.0
        return [[Generation(text="```python\nprint(0)\n```")] for _ in chats]

    def execute(self, executions: Sequence[Execution]) -> list[Verdict]:
        """Programs that print nothing but 0 are wrong."""
        return [Verdict(status="wrong_answer") for _ in executions]

    def close(self) -> None:
        """Nothing to close."""


def counted_calls(file: Path, work: Callable[[], None]) -> None:
    """Run ``work`` and write down how many Python functions it called."""
    calls = count_calls(work, None)
    file.write_text(str(calls))


def count_calls(work: Callable[[], None], kill_at: int | None) -> int:
    """Run ``work``, counting the calls of Python functions; die by SIGKILL at the ``kill_at``-th."""
    calls = 0

    def seen(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(seen)
    work()
    sys.setprofile(None)
    return calls


def live(config: Config, run_dir: Path, staleness: int, **changes: Any) -> None:
    """RL with the services above; leaves what they were told in services.json."""
    services = Services(run_dir)
    collect.connect = lambda *_: services  # type: ignore[assignment]
    options = replace(config.rl, replay=None, max_staleness=staleness, importance_cap=2.0, **{"steps": 3, **changes})
    rl.run(replace(config, rl=options), run_dir)
    told = {"published": services.published, "drawn": services.drawn}
    (run_dir / "services.json").write_text(json.dumps(told))


def stopped(config: Config, run_dir: Path) -> None:
    """As :func:`live`, two versions ahead, told to stop at the update of step 2, while later rollouts are made."""
    improve = rl.improve

    def told(*arguments: Any) -> dict[str, float]:
        if arguments[5] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return improve(*arguments)

    rl.improve = told
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    live(config, run_dir, 2, steps=6)


def main(folder: Path) -> None:
    """Every case; the wait statuses go to stages.json."""
    config, log = config_of(folder), folder / "stages.log"
    record_replay(folder / "replay", config.rl.steps)
    status: dict[str, Any] = {}

    background = replace(config, trainer=replace(config.trainer, save="async"))

    def both(run_dir: Path, config: Config = config) -> None:
        if not (run_dir / "sft" / "hf").exists():
            sft.run(config, run_dir)
        rl.run(config, run_dir)

    status["whole"] = in_child(lambda: both(folder / "whole"), log)
    calls = folder / "calls.txt"
    status["again"] = in_child(lambda: counted_calls(calls, lambda: both(folder / "again", background)), log)
    status["kills"] = [
        in_child(lambda number=number: killed_before_rename(number, lambda: both(folder / "killed")), log)  # type: ignore[misc]
        for number in KILLS
    ]
    status["killed"] = in_child(lambda: both(folder / "killed"), log)
    rng = random.Random(11)
    moments = [int(int(calls.read_text()) * rng.uniform(0.05, 0.3)) for _ in range(RANDOM_KILLS)]
    status["random_kills"] = [
        in_child(lambda moment=moment: count_calls(lambda: both(folder / "killed-anywhere", background), moment), log)  # type: ignore[misc]
        for moment in moments
    ]
    status["killed-anywhere"] = in_child(lambda: both(folder / "killed-anywhere", background), log)
    for staleness in (0, 1):
        run_dir = folder / f"live-{staleness}"
        status[f"live-{staleness}"] = in_child(lambda run_dir=run_dir, n=staleness: live(config, run_dir, n), log)  # type: ignore[misc]
    status["chunks"] = in_child(lambda: live(config, folder / "chunks", 1, chunk=1, chunks_in_flight=2), log)
    status["stopped"] = in_child(lambda: stopped(config, folder / "ahead"), log)
    status["ahead"] = in_child(lambda: live(config, folder / "ahead", 2, steps=6), log)
    status["ppo"] = in_child(lambda: live(config, folder / "ppo", 0, estimator="gae"), log)
    adapted = replace(config, lora=LoraConfig(rank=2))
    status["lora"] = in_child(lambda: both(folder / "lora", adapted), log)
    status["refill"] = in_child(lambda: live(config, folder / "refill", 0, refill_rounds=2), log)
    (folder / "stages.json").write_text(json.dumps(status))


def record_replay(folder: Path, steps: int) -> None:
    """Random rollouts of every step."""
    rng = random.Random(5)
    for step in range(steps):
        rollouts = []
        for group in range(4):
            prompt = tuple(rng.randrange(3, 260) for _ in range(rng.randrange(4, 9)))
            for _ in range(4):
                tokens = tuple(rng.randrange(3, 260) for _ in range(rng.randrange(2, 12)))
                rollouts.append(
                    Rollout(
                        solution_id=f"{step}/{group}",
                        critique="c",
                        judgement=None,
                        draft_accepted=False,
                        revision="r",
                        kept=False,
                        status="wrong_answer",
                        reward=float(rng.random() < 0.5),
                        reason="wrong_answer",
                        masked=rng.random() < 0.1,
                        prompt_ids=prompt,
                        token_ids=tokens,
                        logprobs=tuple(-5.7 for _ in tokens),
                        finish_reason="stop",
                        version=step,
                    )
                )
        jsonl.write(folder / f"step-{step:06d}.jsonl", rollouts)
