"""``ctrl-hpc convert``: there and back to the bit, through any layouts; one line for what cannot be."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrl_hpc import cli
from ctrl_hpc.megatron import architecture
from ctrl_hpc.megatron.weights import Folder
from ctrl_hpc.rollout.weights import weight_files


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-untied", "llama-tied"])
def test_there_and_back_through_other_layouts_keeps_every_bit(workplace: Path, tmp_path: Path, model: str) -> None:
    source, there, back = workplace / "models" / model, tmp_path / "there", tmp_path / "back"
    assert cli.main(["convert", "hf-to-megatron", str(source), str(there), "--tp", "2", "--pp", "2"]) == 0
    assert cli.main(["convert", "megatron-to-hf", str(there), str(back)]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hf-to-megatron", "{tmp}/nowhere", "{tmp}/dst"], "nowhere: not a Hugging Face model folder"),
        (["megatron-to-hf", "{models}/qwen2-tied", "{tmp}/dst"], "qwen2-tied: not a Megatron checkpoint of ctrl-hpc"),
        (["hf-to-megatron", "{models}/qwen2-tied", "{models}/llama-tied"], "llama-tied: exists; nothing was"),
        (["hf-to-megatron", "{models}/qwen2-tied", "{tmp}/no/dst"], "/no/dst: its folder"),
        (["hf-to-megatron", "{models}/qwen2-tied", "{tmp}/dst", "--tp", "3"], "parallel.tensor=3 must divide"),
        (["hf-to-megatron", "{models}/qwen2-tied", "{tmp}/dst", "--pp", "0"], "--pp: 0 is not allowed"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    arguments: list[str], told: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tmp": tmp_path, "models": workplace / "models"}
    assert cli.main(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_without_weights_is_one_line_and_leaves_nothing(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "empty"
    source.mkdir()
    (source / "config.json").write_text((workplace / "models" / "qwen2-tied" / "config.json").read_text())
    assert cli.main(["convert", "hf-to-megatron", str(source), str(tmp_path / "dst"), "--tp", "2"]) == 2
    error = capsys.readouterr().err
    assert "safetensors weights are needed" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def spoil(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def surplus_row(tensors: dict[str, Tensor]) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:1]])


def unknown(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)


def other_output(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (surplus_row, "tensor model.embed_tokens.weight is ["),
        (unknown, "tensor model.layers.0.self_attn.sinks is not part of a qwen2"),
        (other_output, "tensor lm_head.weight differs from model.embed_tokens.weight"),
        (missing, "tensor model.norm.weight is missing"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], told: str, workplace: Path, tmp_path: Path
) -> None:
    folder = spoil(workplace / "models" / "qwen2-tied", tmp_path / "model", change)
    with pytest.raises(ValueError, match=re.escape(told)):
        Folder(folder).check(architecture.read(folder))


def test_what_belongs_is_let_through(workplace: Path, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    folders = [spoil(workplace / "models" / "qwen2-tied", tmp_path / "model", repeat)]
    folders += [workplace / "models" / name for name in ("qwen2-tied", "qwen3-untied", "llama-tied")]
    for folder in folders:
        Folder(folder).check(architecture.read(folder))


def test_the_tensors_type_decides(workplace: Path, tmp_path: Path) -> None:
    source = workplace / "models" / "qwen2-tied"

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    def mix(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    def half(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    assert Folder(source).dtype() == "float32"
    assert Folder(spoil(source, tmp_path / "bf16", halve)).dtype() == "bfloat16"
    with pytest.raises(ValueError, match=r"tensors of several types: model\.norm\.weight is BF16"):
        Folder(spoil(source, tmp_path / "mixed", mix)).dtype()
    with pytest.raises(ValueError, match="is F16, which is not supported; allowed: F32, BF16"):
        Folder(spoil(source, tmp_path / "half", half)).dtype()


def test_a_gguf_folder_is_told_how_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"no config.json\); model-q4.gguf is converted as docs/your-models.md says"):
        architecture.read(tmp_path)
    with pytest.raises(ValueError, match=r"model-q4.gguf is converted"):
        weight_files(tmp_path)


@pytest.mark.slow
def test_bfloat16_tensors_under_a_float32_configuration_keep_their_bits(workplace: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    source = spoil(workplace / "models" / "qwen2-tied", tmp_path / "source", halve)
    there, back = tmp_path / "there", tmp_path / "back"
    assert cli.main(["convert", "hf-to-megatron", str(source), str(there)]) == 0
    assert cli.main(["convert", "megatron-to-hf", str(there), str(back)]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert [name for name in before if not before[name].equal(after[name])] == []
