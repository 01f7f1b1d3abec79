"""``rl.publish=delta``: at each version of a real training a server holds the trainer's bits, whatever it missed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from megatron_jobs import spawn
from safetensors.torch import load_file

from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.rollout.engine import PaddedEngine, load_engine
from ctrl_hpc.train.ahead import _whole_before, weights_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(workplace: Path) -> Path:
    """Six versions by two tensor-parallel ranks, one in four whole."""
    spawn("publishing", "check", workplace, 2)
    return workplace / "publishing"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_both_ranks_write_and_whole_versions_come_in_turn(published: Path) -> None:
    abouts = [About.read(weights_folder(published, version)) for version in range(6)]
    assert [about.base for about in abouts if about] == [None, "v000000", "v000001", "v000002", None, "v000004"]
    assert abouts[1] is not None and abouts[1].tensors is not None and abouts[3] is not None
    assert {told["file"] for told in abouts[1].tensors.values()} == {
        "delta-000-000-000.safetensors",
        "delta-000-000-001.safetensors",
    }
    assert abouts[3].tensors == {}  # no step was made between
    assert [_whole_before(published, version) for version in range(6)] == [0, 0, 0, 0, 4, 4]


@pytest.mark.parametrize("loads", [(0, 1, 2, 3, 4, 5), (3,), (1, 3, 5), (5, 2)])
def test_a_server_holds_the_bits_of_each_version(
    published: Path, workplace: Path, tmp_path: Path, loads: tuple[int, ...]
) -> None:
    shutil.copytree(workplace / "models" / "qwen2-tied", tmp_path / "started")
    engine = load_engine(str(tmp_path / "started"), device="cpu")
    assert isinstance(engine, PaddedEngine)
    for version in loads:
        engine.load_weights(str(weights_folder(published, version)), version)
        own = engine.model.state_dict()
        whole = tensors(published / "whole" / str(version))
        assert len(whole) > 10 and all(torch.equal(own[name], tensor) for name, tensor in whole.items())
