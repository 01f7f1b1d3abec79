"""``ctrl-hpc convert``: there and back to the bit, through any layouts; one line for what cannot be."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ctrl_hpc import cli


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


class _Code:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._mark),)


def test_metadata_of_others_runs_nothing(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, mark = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(workplace / "models" / "qwen2-tied", source / "huggingface")
    (source / ".metadata").write_bytes(pickle.dumps(_Code(mark)))
    assert cli.main(["convert", "megatron-to-hf", str(source), str(tmp_path / "dst")]) == 2
    assert "is no plain metadata of a checkpoint, and is not read: names posix.mkdir" in capsys.readouterr().err
    assert not mark.exists()


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
