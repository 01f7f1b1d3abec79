"""``ctrl-hpc bench trainer``: memory of a trainer's rank beside the plan's, tokens/s."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config, OptimizerConfig, ParallelConfig, RLConfig, TrainerConfig
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.plan.memory import Memory, Workload, estimate
from ctrl_hpc.plan.plan import count, training_flops
from ctrl_hpc.plan.work import update_passes
from ctrl_hpc.train.batch import Batch, collate
from ctrl_hpc.train.losses import RLLoss, SFTLoss
from ctrl_hpc.train.policy import Loss, Policy

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "200M"
    """``200M``, a known model's name (``configs/models.json``) or a folder with a config.json."""
    tokens: int = 1024
    """Of a micro-batch."""
    micro_batches: int = 1
    """A step."""
    steps: int = 1
    """Steps timed, after one that is not; 0 measures memory alone."""
    threads: int = 2
    """CPU threads."""
    recompute: str = "none"
    """``parallel.recompute``."""
    peak_tflops: float | None = None
    """The device's dense bf16 peak, for MFU; None: an H100's or H200's 989 on a GPU, none on a CPU."""
    group: tuple[int, int, int] | None = None
    """Tokens of a prompt, its responses, tokens of each: RL's update with the prompt computed once, and for each."""


def bench(options: Options, out: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, write ``out`` as JSON.

    Raises ValueError for an unknown model, RuntimeError with the child's last line when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-bench-") as folder:
        for work in ("write", "measure"):
            command = [sys.executable, "-m", "ctrl_hpc.train.measure", work, folder, json.dumps(asdict(options))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
                raise (ValueError if last.startswith("ValueError: ") else RuntimeError)(last.partition(": ")[2] or last)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    _show(found)
    if out is not None:
        jsonl.write_text(out, json.dumps(found, indent=1) + "\n")
    return found


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['model']}, {count(found['parameters'])} parameters, on {found['device']}")
    for column in ("memory", "GiB"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for kind, size in found["planned"].items():
        table.add_row(f"planned: {kind}", f"{size / GIB:.2f}")
    table.add_row("planned", f"{found['planned_bytes'] / GIB:.2f}")
    table.add_row("measured", f"{found['measured_bytes'] / GIB:.2f}")
    table.add_row("planned / measured", f"{found['planned_bytes'] / found['measured_bytes']:.3f}")
    console = Console()
    console.print(table)
    for stage in ("sft", "rl"):
        if stage in found:
            rate = found[stage]
            mfu = "" if rate["mfu"] is None else f", MFU {100 * rate['mfu']:.1f} %"
            console.print(f"{stage} update: {rate['tokens_per_s']:.0f} tokens/s, {rate['tflops']:.3g} Tflop/s{mfu}")
    if "shared_prefix" in found:
        prefix = found["shared_prefix"]
        rates = ", ".join(f"{kind} {prefix[kind]:.0f} tokens/s" for kind in ("once", "each"))
        told = "{} + {} x {} tokens".format(*prefix["group"])
        console.print(f"rl update of {told}, the prompt computed: {rates}, {prefix['ratio']:.2f} times")
    console.print(f"kernels: {found['kernels']}")


LENGTH = 256
"""Tokens of a sequence, half of them in the loss; fewer where a micro-batch is smaller."""
_MID_SIZE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 3584,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
"""A critic of 200 million parameters, called ``200M``: what a CPU can measure."""


def write(folder: Path, options: Options) -> None:
    """A critic of random weights in ``folder``, in the precision it is trained in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if options.model == "200M":
        hf = AutoConfig.for_model(**_MID_SIZE)
    elif (Path(options.model) / "config.json").is_file():
        hf = AutoConfig.from_pretrained(options.model)
    else:
        hf = architectures.known_config(options.model)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model.save_pretrained(folder)


def measure(folder: Path, options: Options) -> dict[str, Any]:
    """Train the critic of ``folder`` for some steps; sizes in bytes."""
    on_gpu = torch.cuda.is_available()
    config = Config(
        name="bench",
        trainer=TrainerConfig(micro_batch_tokens=options.tokens, threads=options.threads),
        parallel=ParallelConfig(recompute=options.recompute),  # type: ignore[arg-type]
        rl=RLConfig(kl_coef=0.0),
    )
    before = _reset_peak(on_gpu)
    with parallel_state.job(config) as world:
        policy = Policy(config, world, folder, optimizer=OptimizerConfig(lr=1e-6, schedule="constant"))
        batch = _batch(options, policy.architecture.vocab_size)
        policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-6)
        planned = estimate(policy.architecture, config.parallel, _workload(options, batch, on_gpu))[0]
        found: dict[str, Any] = {
            "model": options.model,
            "device": policy.engine()["device"],
            "kernels": policy.kernels,
            "parameters": policy.architecture.n_parameters,
            "tokens": options.tokens,
            "planned": {field.name: getattr(planned, field.name) for field in fields(Memory)},
            "planned_bytes": planned.total,
            "measured_bytes": _peak(on_gpu) - before,
        }
        if options.steps:
            found |= _rates(policy, batch, options, on_gpu)
        if options.steps and options.group is not None:
            found["shared_prefix"] = _prefix_rates(policy, options.group, options.steps)
    return found


def _batch(options: Options, vocab_size: int) -> Batch:
    """Random sequences that fill the micro-batches exactly: their inputs are a token shorter than they are."""
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, options.tokens)
    rows = options.tokens // length * options.micro_batches
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=generator).tolist()
    return collate([(row[: length // 2 + 1], row[length // 2 + 1 :]) for row in ids])


def _workload(options: Options, batch: Batch, on_gpu: bool) -> Workload:
    responses = batch.n_tokens // options.micro_batches
    return Workload(data_size=1, tokens=options.tokens, response_tokens=responses, on_gpu=on_gpu, half=on_gpu)


def _rates(policy: Policy, batch: Batch, options: Options, on_gpu: bool) -> dict[str, Any]:
    tokens = int((batch.lengths_S - 1).sum())
    flops = training_flops(policy.architecture, tokens, tokens * min(LENGTH, options.tokens) / 2, batch.n_tokens)
    peak = options.peak_tflops or (989.0 if on_gpu else None)
    old_SR = policy.logprobs(batch)
    advantages_SR = torch.ones_like(old_SR) * batch.mask_SR
    rl = RLLoss.of(batch, policy.config.rl, advantages_SR=advantages_SR, rollout_SR=old_SR, old_SR=old_SR)
    found = {}
    losses: dict[str, Loss] = {"sft": SFTLoss(n_tokens=batch.n_tokens), "rl": rl}
    for name, loss in losses.items():
        policy.update(batch, loss, 1e-6)  # the first call of a loss compiles its kernels
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(options.steps):
            policy.update(batch, loss, 1e-6)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / options.steps
        useful = flops / seconds / 1e12
        mfu = None if peak is None else useful / peak
        executed = useful * update_passes(policy.config) / 3  # as the plan counts
        found[name] = {"tokens_per_s": tokens / seconds, "tflops": executed, "mfu": mfu}
    return found


def _prefix_rates(policy: Policy, group: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """Tokens/s of an update on one group, prompts counted for each response; the best of ``steps``, taken in turn."""
    n_prompt, n_responses, n_tokens = group
    generator = torch.Generator().manual_seed(1)
    vocab_size = policy.architecture.vocab_size
    prompt = torch.randint(0, vocab_size, (n_prompt,), generator=generator).tolist()
    responses = torch.randint(0, vocab_size, (n_responses, n_tokens), generator=generator).tolist()
    batch = collate([(prompt, response) for response in responses])
    tokens = int((batch.lengths_S - 1).sum())
    ones_SR = batch.mask_SR.float()
    loss = RLLoss.of(batch, policy.config.rl, advantages_SR=ones_SR, rollout_SR=-ones_SR, old_SR=-ones_SR)
    times: dict[str, list[float]] = {"once": [], "each": []}
    for _ in range(1 + steps):
        for kind, seconds in times.items():
            trainer = replace(policy.config.trainer, shared_prefix=kind == "once", micro_batch_tokens=tokens)
            policy.config = replace(policy.config, trainer=trainer)
            started = time.perf_counter()
            policy.update(batch, loss, 1e-6)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    best = {kind: min(seconds[1:]) for kind, seconds in times.items()}
    rates = {kind: tokens / seconds for kind, seconds in best.items()}
    return {"group": list(group), **rates, "ratio": rates["once"] / rates["each"]}


def _reset_peak(on_gpu: bool) -> int:
    """Forget the largest size so far; bytes held now. On a GPU those of torch's allocator, else the process's."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(on_gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if on_gpu else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def main() -> None:
    """One process of a measurement: ``write`` or ``measure``."""
    work, folder, options = sys.argv[1], Path(sys.argv[2]), Options(**json.loads(sys.argv[3]))
    if work == "write":
        write(folder, options)
    else:
        print(json.dumps(measure(folder, options)))


if __name__ == "__main__":
    main()
