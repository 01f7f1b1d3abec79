"""Jobs of several ranks on this machine, and small random models in Hugging Face's format."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from ctrl_hpc.config import ParallelConfig

TIMEOUT_S = 500.0


LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    1: {"single": ParallelConfig()},
    2: {
        "tp2": ParallelConfig(tensor=2),
        "tp2-sp": ParallelConfig(tensor=2, sequence=True),
        "pp2": ParallelConfig(pipeline=2),
        "dp2": ParallelConfig(),
        "tp2-recompute": ParallelConfig(tensor=2, recompute="full"),
    },
    4: {
        "tp4": ParallelConfig(tensor=4),
        "tp4-sp": ParallelConfig(tensor=4, sequence=True),
        "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
        "tp2-sp-pp2": ParallelConfig(tensor=2, pipeline=2, sequence=True),
        "tp2-dp2": ParallelConfig(tensor=2),
    },
}


def sequences(vocab_size: int, count: int = 9, prompt: int | None = 1) -> list[tuple[list[int], list[int]]]:
    """Random (prompt, response) pairs, the same in every process."""
    generator = torch.Generator().manual_seed(7)

    def ids(n: int) -> list[int]:
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    lengths = torch.randint(4, 24, (count, 2), generator=generator).tolist()
    return [(ids(prompt or p), ids(r)) for p, r in lengths]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(module: str, check: str, folder: Path, ranks: int = 1) -> None:
    """Run a function of a module here, given ``folder``, on some ranks; fails with the log of the ranks that failed.

    Ranks are forked from a server that has imported Megatron and transformers once for all tests of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ctrl_hpc.train.rl", "ctrl_hpc.train.sft", "transformers.models.qwen2"])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"{module}-{check}-{ranks}-rank{rank}.log" for rank in range(ranks)]
    started = []
    try:
        with patch.dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1"):
            for rank, log in enumerate(logs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(context.Process(target=_rank, args=(module, check, folder, log, own)))
                started[-1].start()
        end = time.monotonic() + TIMEOUT_S
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in started:
            process.kill()
            process.join()
    failed = [
        f"{log.name} (exit code {process.exitcode}):\n{log.read_text()[-4000:]}"
        for process, log in zip(started, logs, strict=True)
        if process.exitcode
    ]
    assert not failed, "\n".join(failed)


def _rank(module: str, check: str, folder: Path, log: Path, environment: dict[str, str]) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    getattr(importlib.import_module(module), check)(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _qwen2(tied: bool, **sizes: int) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=tied, **sizes))


def _qwen3(tied: bool, **sizes: int) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=tied, **sizes))


def _llama(tied: bool, rope: dict[str, object], **sizes: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, rope_parameters=rope, **sizes))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 8, "intermediate_size": 96}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "qwen2-tied": lambda: _qwen2(True, vocab_size=101, num_key_value_heads=4, **HEADS, **COMMON),
    "qwen2-untied": lambda: _qwen2(False, vocab_size=257, num_key_value_heads=2, **HEADS, **COMMON),
    "qwen3-tied": lambda: _qwen3(True, vocab_size=83, num_key_value_heads=4, head_dim=16, **HEADS, **COMMON),
    "qwen3-untied": lambda: _qwen3(False, vocab_size=130, num_key_value_heads=8, head_dim=8, **HEADS, **COMMON),
    "llama-tied": lambda: _llama(True, YARN_ROPE, vocab_size=99, num_key_value_heads=1, **HEADS, **COMMON),
    "llama-untied": lambda: _llama(False, LLAMA3_ROPE, vocab_size=256, num_key_value_heads=8, **HEADS, **COMMON),
}
"""Both embeddings, several ratios of grouped queries (fewer groups than ranks among them), odd vocabularies, scaled
rotary embeddings."""


def write_models(folder: Path) -> None:
    """Every model of ``MODELS`` in ``folder``, in Hugging Face's format."""
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():  # large enough that mistakes show, biases and norms not at their defaults
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
        model.save_pretrained(folder / name)  # type: ignore[operator]
