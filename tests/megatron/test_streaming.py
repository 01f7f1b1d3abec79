"""Weights stream: a rank needs its own part and one tensor; many files come in and go out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron_jobs import spawn
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critic of 160 MiB in small files, loaded and exported by two tensor-parallel ranks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    place = tmp_path_factory.mktemp("streaming")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(place / "sharded", max_shard_size="8MB")
    assert len(list((place / "sharded").glob("*.safetensors"))) > 5
    spawn("streaming", "check", place, 2)
    return place


@pytest.mark.parametrize("rank", [0, 1])
def test_loading_needs_one_tensor_beyond_the_ranks_own_part(folder: Path, rank: int) -> None:
    found = json.loads((folder / f"streaming-{rank}.json").read_text())
    whole = sum(file.stat().st_size for file in (folder / "sharded").glob("*.safetensors"))
    assert found["spare"] < whole / 2, "the limit is far below the whole"
    assert found["loaded"]


def test_an_export_of_several_files_has_an_index_and_the_same_bits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    index = json.loads((folder / "sharded-export" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and {name.split("-")[3] for name in files} == {"000", "001"}, "both ranks write"
    original, exported = {}, {}
    for file in (folder / "sharded").glob("*.safetensors"):
        original |= load_file(file)
    for file in (folder / "sharded-export").glob("*.safetensors"):
        exported |= load_file(file)
    assert original.keys() == exported.keys() == index["weight_map"].keys()
    assert all(original[name].equal(exported[name]) for name in original)
    assert index["metadata"]["total_size"] == sum(
        file.stat().st_size for file in (folder / "sharded-export").glob("*.safetensors")
    )
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder / "sharded-export").named_parameters())
    assert all(loaded[name].detach().equal(original[name]) for name in original)
