"""What ranks of a trainer die of: ``main`` makes every fault happen in forked ranks.

FOLDER/models/qwen2-tied must be there. Leaves a log a rank, CASE-RANK.log, and faults.json with the wait statuses of
the ranks that ended by themselves (None for those that had to be killed).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron_jobs import free_port, sequences
from torch import Tensor

from ctrl_hpc.config import Config, OptimizerConfig, ParallelConfig, TrainerConfig, WandbConfig
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.loop import Loop
from ctrl_hpc.train.losses import SFTLoss
from ctrl_hpc.train.policy import Policy

TIMEOUT_S = 10.0
"""Of a collective in the case of a hung one: long enough to be far from what a step takes here."""
PATIENCE_S = 120.0
FAULT_STEP = 2


def config_of(ranks: int, **trainer: Any) -> Config:
    """The ranks of a case are one tensor-parallel group."""
    options = TrainerConfig(**{"device": "cpu", "micro_batch_tokens": 64, "timeout_s": 300.0, **trainer})
    return Config(
        name="faults",
        trainer=options,
        parallel=ParallelConfig(tensor=ranks),
        wandb=WandbConfig(mode="disabled"),
    )


def train(config: Config, folder: Path, case: str, fault: Callable[[Tensor], Tensor], rows: int = 6) -> None:
    """Four steps saved each, the third one with the fault in its loss."""
    with parallel_state.job(config) as world:
        optimizer = OptimizerConfig(lr=1e-3)
        policy = Policy(config, world, folder / "models" / "qwen2-tied", optimizer=optimizer)
        loop = Loop(config, folder / case, "sft", {"policy": policy}, steps=4, save_every=1)
        with loop:
            for step in loop:
                faulty = step == FAULT_STEP
                pairs = sequences(policy.architecture.vocab_size, rows if faulty else 6)
                batch = collate(pairs)
                plain = SFTLoss(n_tokens=batch.n_tokens)

                def loss(head: Any, micro: Any, hidden_ND: Tensor, plain: Any = plain, faulty: bool = faulty) -> Any:
                    return plain(head, micro, fault(hidden_ND) if faulty else hidden_ND)

                loop.done(step, policy.update(batch, loss, 1e-3))


def last_rank() -> bool:
    """Whether this is the rank at fault."""
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def hang(hidden_ND: Tensor) -> Tensor:
    """Never come to the next collective."""
    while last_rank():
        time.sleep(0.1)
    return hidden_ND


def die(hidden_ND: Tensor) -> Tensor:
    """As the kernel's out-of-memory killer ends a process."""
    if last_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    return hidden_ND


def not_a_number(hidden_ND: Tensor) -> Tensor:
    """A gradient that is NaN everywhere."""
    return hidden_ND * torch.tensor(float("nan"))


def starve(_hidden_ND: Tensor) -> Tensor:
    """Only called when the forward pass found the memory that it should not."""
    raise AssertionError("the limit on memory was not felt")


def limit_memory() -> None:
    """Leave 32 MiB of memory to this process beyond what it holds."""
    status = Path("/proc/self/status").read_text()
    held_kb = int(status.split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, ((held_kb + 32 * 1024) * 1024,) * 2)


def out_of_memory(config: Config, folder: Path) -> None:
    """A micro-batch of all rows is more than the limit leaves."""

    def fault(hidden_ND: Tensor) -> Tensor:
        return starve(hidden_ND)

    update = Policy.update

    def limited(self: Policy, batch: Any, loss: Any, lr: float) -> dict[str, float]:
        if len(batch) > 6:
            limit_memory()
        return update(self, batch, loss, lr)

    Policy.update = limited  # type: ignore[method-assign]
    train(config, folder, "memory", fault, rows=4000)


def unfit(config: Config, folder: Path) -> None:
    """Continue from a checkpoint of another critic."""
    with parallel_state.job(config) as world:
        policy = Policy(config, world, folder / "models" / "llama-untied", optimizer=OptimizerConfig(lr=1e-3))
        Loop(config, folder / "nan", "sft", {"policy": policy}, steps=4, save_every=1)


Case = tuple[int, Callable[[Config, Path], None], dict[str, Any]]
CASES: dict[str, Case] = {
    "hang": (2, lambda config, folder: train(config, folder, "hang", hang), {"timeout_s": TIMEOUT_S}),
    "dead": (2, lambda config, folder: train(config, folder, "dead", die), {}),
    "nan": (1, lambda config, folder: train(config, folder, "nan", not_a_number), {}),
    "unfit": (1, unfit, {}),
    "memory": (1, out_of_memory, {"micro_batch_tokens": 1 << 20}),
}
"""Ranks, what each does, and the trainer's options; ``unfit`` reads what ``nan`` saved."""


def fork(folder: Path, case: str, rank: int, ranks: int, port: int) -> int:
    """Start a rank; its process id."""
    child = os.fork()
    if child:
        return child
    with (folder / f"{case}-{rank}.log").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        code = 0
        try:
            _, work, options = CASES[case]
            work(config_of(ranks, **options), folder)
        except Exception:  # noqa: BLE001 - the test reads the log
            traceback.print_exc()
            code = 1
        out.flush()
    os._exit(code)


def wait(child: int, deadline: float, enough: Callable[[], bool]) -> int | None:
    """The wait status of a rank; None when it had to be killed, once its log is enough or at the deadline."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if enough():
            break
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main(folder: Path) -> None:
    """Every case; the wait statuses go to faults.json."""
    statuses: dict[str, list[int | None]] = {}
    for case, (ranks, _, _) in CASES.items():
        port = free_port()
        children = [fork(folder, case, rank, ranks, port) for rank in range(ranks)]
        deadline = time.monotonic() + PATIENCE_S

        def hung(case: str = case) -> bool:
            return case == "hang" and "in hang" in (folder / "hang-1.log").read_text()

        first = [wait(child, deadline, lambda: False) for child in children[:-1]]
        statuses[case] = [*first, wait(children[-1], deadline, hung)]
    (folder / "faults.json").write_text(json.dumps(statuses))
