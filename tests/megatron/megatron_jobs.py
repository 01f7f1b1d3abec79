"""Jobs of several ranks on this machine, and small random models in Hugging Face's format."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ctrl_hpc.config import ParallelConfig

HERE = Path(__file__).parent
TIMEOUT_S = 300.0


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


def spawn(check: str, folder: Path, ranks: int, *, script: str = "ranks.py", **environment: str) -> None:
    """Run a check of ``script`` on some ranks to its end; fails with the log of the ranks that failed."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    logs = [folder / f"{check}-{ranks}-rank{rank}.log" for rank in range(ranks)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, str(HERE / script), check, str(folder)]
                started.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
        codes = [process.wait(TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    failed = [
        f"{log.name} (exit code {code}):\n{log.read_text()[-4000:]}"
        for code, log in zip(codes, logs, strict=True)
        if code
    ]
    assert not failed, "\n".join(failed)


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
