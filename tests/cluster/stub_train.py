"""A training stage that counts steps, and misbehaves on request: what the trainer job's tests run on every rank."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from ctrl_hpc.run.journal import Journal


def run(config: Any, run_dir: Path) -> None:
    """Behaves as ``run_dir/behaviour.json`` says.

    fail_rank, kill_rank_once, freeze_rank_once, hang, all_reduce, stop_main_once.
    """
    wishes = json.loads((run_dir / "behaviour.json").read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (run_dir / f"rank-{rank}-of-{world}").write_text(
        json.dumps({key: os.environ.get(key) for key in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "WANDB_RUN_ID")})
    )
    if wishes.get("fail_rank") == rank:
        raise ValueError("the data set is empty")
    once = run_dir / "killed-once"
    if wishes.get("kill_rank_once") == rank and not once.exists():
        once.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    if wishes.get("freeze_rank_once") == rank and not once.exists():
        once.write_text("")
        os.kill(os.getpid(), signal.SIGSTOP)
    if wishes.get("freeze_rank_once") is not None and rank != wishes["freeze_rank_once"] and not once.exists():
        while True:
            time.sleep(0.1)
    if wishes.get("hang") or (wishes.get("kill_rank_once") is not None and not once.exists()) or "fail_rank" in wishes:
        while True:
            time.sleep(0.1)
    if wishes.get("all_reduce"):
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        dist.destroy_process_group()
        node = os.environ.get("SLURMD_NODENAME")
        (run_dir / f"sum-{rank}").write_text(json.dumps({"sum": total.item(), "node": node}))
    if wishes.get("stop_main_once"):
        from ctrl_hpc.megatron import parallel_state

        def read() -> str:
            if not once.exists():
                once.write_text("")
                os.kill(os.getpid(), signal.SIGTERM)
            return "records"

        with parallel_state.job(config) as place:
            assert place.from_main(read) == "records"
    if rank == 0:
        Journal(run_dir, "sft").log(2, {"sft/loss": 0.5}, steps=3)
