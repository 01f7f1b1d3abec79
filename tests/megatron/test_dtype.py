"""What the trainer computes in where nobody says."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ctrl_hpc.config import Config, TrainerConfig
from ctrl_hpc.config.method import CriticConfig
from ctrl_hpc.megatron import parallel_state


@pytest.mark.parametrize(
    ("stored", "has", "asked", "expected"),
    [
        (torch.bfloat16, True, "auto", torch.bfloat16),
        (torch.bfloat16, False, "auto", torch.float32),
        (torch.float32, True, "auto", torch.float32),
        (None, True, "auto", torch.float32),
        (torch.bfloat16, True, "float32", torch.float32),
        (torch.float32, False, "bfloat16", torch.bfloat16),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_the_critic_is_and_the_processor_multiplies_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype | None,
    has: bool,
    asked: str,
    expected: torch.dtype,
) -> None:
    if stored is not None:
        save_file({"weight": torch.zeros(2, dtype=stored)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(parallel_state, "cpu_has_bfloat16", lambda: has)
    trainer = TrainerConfig(dtype=asked)  # type: ignore[arg-type]
    config = Config(name="x", critic=CriticConfig(model=str(tmp_path)), trainer=trainer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert parallel_state._dtype(config, "cpu") == expected
        assert parallel_state._dtype(Config(name="x"), "cuda") == torch.bfloat16
    finally:
        dist.destroy_process_group()


def test_a_run_goes_on_in_the_type_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "critic").mkdir()
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "critic" / "model.safetensors")
    here: list[bool] = []
    monkeypatch.setattr(parallel_state, "cpu_has_bfloat16", lambda: here[-1])

    def chosen(run: str, has: bool) -> bool:
        here.append(has)
        critic = CriticConfig(model=str(tmp_path / "critic"))
        return parallel_state._pays(Config(name="x", run_dir=str(tmp_path / run), critic=critic))

    assert [chosen("new", True), chosen("new", False), chosen("new", True)] == [True, True, True]
    assert chosen("plain", False) is False
    (tmp_path / "plain" / "sft" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert chosen("plain", True) is False  # its checkpoints are float32
