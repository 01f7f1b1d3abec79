"""Weights as differences: the same bits, from any version held or none; what does not fit changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import random_qwen
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ctrl_hpc.rollout import deltas
from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.rollout.engine import PaddedEngine, load_engine

Weights = dict[str, torch.Tensor]


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 90))
def test_a_difference_gives_back_the_same_bits(dtype: torch.dtype, seed: int, share: float, size: int) -> None:
    torch.manual_seed(seed)
    old = torch.randn(size, 3).to(dtype)
    old[0, 0] = float("nan")
    new = torch.where(torch.rand(size, 3) < share, torch.randn(size, 3).to(dtype), old)
    packed = deltas.pack(new, old)
    same = torch.equal(new.view(torch.uint8), old.view(torch.uint8))
    assert (packed is None) == same
    if packed is not None:
        assert torch.equal(deltas.unpack(packed, old).view(torch.uint8), new.view(torch.uint8))
        with pytest.raises(ValueError, match="broken difference"):
            deltas.unpack(packed[:-1], old)


def test_a_few_changed_numbers_cost_little() -> None:
    old = torch.randn(100_000).to(torch.bfloat16)
    new = old.clone()
    new[::50] *= 1.01  # the last bits of one number in fifty
    packed = deltas.pack(new, old)
    assert packed is not None and len(packed) < 0.1 * 2 * old.numel()


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, list[Weights]]:
    """Versions 0 (whole) to 3, each a difference to the one before, and their weights."""
    folder = Path(random_qwen.build(tmp_path / "v000000"))
    About(state="s0").write(folder)
    versions = [load_file(folder / "model.safetensors")]
    previous = dict(versions[0])
    torch.manual_seed(1)
    for number in (1, 2, 3):
        target = tmp_path / f"v{number:06d}"
        target.mkdir()
        new = {name: tensor.clone() for name, tensor in versions[-1].items()}
        for name in sorted(new)[number::2]:  # the others stay as they are
            new[name] += 1e-3 * torch.randn_like(new[name])
        told = deltas.write_part(new.items(), previous, target / "delta-000.safetensors")
        assert sorted(told) == sorted(new)[number::2]
        base = f"v{number - 1:06d}"
        About(state=f"s{number}", base=base, base_state=f"s{number - 1}", tensors=told).write(target)
        versions.append(new)
    return tmp_path, versions


def held(engine: PaddedEngine, weights: Weights) -> bool:
    own = engine.model.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("loads", [(3,), (0, 3), (1, 2, 3), (2, 3), (3, 1, 2), (3, 0, 1)])
def test_a_server_comes_to_a_version_from_any_other(
    published: tuple[Path, list[Weights]], tmp_path: Path, loads: tuple[int, ...]
) -> None:
    place, versions = published
    engine = load_engine(random_qwen.build(tmp_path / "started", seed=5), device="cpu")
    assert isinstance(engine, PaddedEngine)
    for version in loads:
        engine.load_weights(str(place / f"v{version:06d}"), version)
        assert engine.version == version and held(engine, versions[version])


def test_a_server_of_fewer_bits_begins_with_the_last_whole_version(published: tuple[Path, list[Weights]]) -> None:
    place, versions = published
    engine = load_engine(str(place / "v000000"), device="cpu")
    assert isinstance(engine, PaddedEngine)
    engine.model.to(torch.bfloat16)
    for version in (1, 2, 3):
        engine.load_weights(str(place / f"v{version:06d}"), version)
        assert held(engine, {name: tensor.to(torch.bfloat16) for name, tensor in versions[version].items()})


def spoil_checksum(place: Path) -> None:
    about = About.read(place / "v000003")
    assert about is not None and about.tensors is not None
    next(iter(about.tensors.values()))["crc"] ^= 1
    about.write(place / "v000003")


def other_base(place: Path) -> None:
    About(state="another").write(place / "v000002")


def without_base(place: Path) -> None:
    (place / "v000002").rename(place / "elsewhere")


def torn(place: Path) -> None:
    file = place / "v000003" / "delta-000.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def another_file(place: Path) -> None:
    save_file({"x": torch.zeros(1)}, place / "v000003" / "delta-000.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_checksum, "its checksum is wrong"),
        (other_base, "is a difference to other weights"),
        (without_base, "which is gone"),
        (torn, "v000003: weight "),
        (another_file, "v000003: weight "),
    ],
)
def test_what_is_spoiled_changes_nothing(
    published: tuple[Path, list[Weights]], spoil: Callable[[Path], None], message: str
) -> None:
    place, versions = published
    engine = load_engine(str(place / "v000000"), device="cpu")
    assert isinstance(engine, PaddedEngine)
    engine.load_weights(str(place / "v000001"), 1)
    spoil(place)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(str(place / "v000003"), 3)
    assert engine.version == 1 and held(engine, versions[1])
