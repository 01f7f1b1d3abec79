"""The critic in Megatron is the critic in transformers: logits, loss, gradients and weights, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_jobs import LAYOUTS, MODELS, sequences, spawn
from safetensors.torch import load_file
from torch.nn import functional

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ALL_LAYOUTS = [layout for layouts in LAYOUTS.values() for layout in layouts]


@pytest.fixture(scope="module")
def found(workplace: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What each model gave in each layout."""
    for ranks in LAYOUTS:
        spawn("ranks", "parity", workplace, ranks)
    return {
        (model, layout): torch.load(workplace / f"parity-{model}-{layout}.pt")
        for model in MODELS
        for layout in ALL_LAYOUTS
    }


@pytest.fixture(scope="module")
def expected(workplace: Path) -> dict[str, dict[str, Any]]:
    """The same by transformers and autograd."""
    from transformers import AutoModelForCausalLM

    out = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(workplace / "models" / name, dtype=torch.float32)
        pairs = sequences(model.config.vocab_size)
        longest = max(len(response) for _, response in pairs)
        logits = torch.zeros(len(pairs), longest, model.config.vocab_size)
        losses = []
        for row, (prompt, response) in enumerate(pairs):
            tokens = torch.tensor([[*prompt, *response]])
            row_logits = model(tokens).logits[0, len(prompt) - 1 : -1]
            losses.append(functional.cross_entropy(row_logits, torch.tensor(response), reduction="sum"))
            logits[row, : len(response)] = row_logits.detach()
        loss = sum(losses) / sum(len(response) for _, response in pairs)
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        out[name] = {"logits": logits, "loss": loss.item(), "gradients": gradients}
    return out


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error of a whole tensor; absolute where the reference is zero but for rounding."""
    return float((actual - reference).norm() / reference.norm().clamp_min(1e-6))


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_loss_and_gradients_equal_those_of_transformers(
    found: dict[tuple[str, str], dict[str, Any]], expected: dict[str, dict[str, Any]], model: str, layout: str
) -> None:
    ours, theirs = found[model, layout], expected[model]
    assert (ours["logits"] - theirs["logits"]).abs().max() <= 1e-4
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    assert {name: e for name, g in theirs["gradients"].items() if (e := error(ours["gradients"][name], g)) > 1e-4} == {}


@pytest.mark.parametrize("layout", [layout for layout in ALL_LAYOUTS if layout != "single"])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_loss_and_gradients_of_a_single_process(
    found: dict[tuple[str, str], dict[str, Any]], model: str, layout: str
) -> None:
    ours, single = found[model, layout], found[model, "single"]
    assert ours["loss"] == pytest.approx(single["loss"], rel=1e-5)
    together = [torch.cat([x["gradients"][n].flatten() for n in single["gradients"]]) for x in (ours, single)]
    assert error(*together) <= 1e-5


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_exported_weights_are_the_loaded_ones_to_the_bit(
    found: dict[tuple[str, str], dict[str, Any]], workplace: Path, model: str, layout: str
) -> None:
    original = load_file(workplace / "models" / model / "model.safetensors")
    folder = workplace / "exports" / f"{model}-{layout}"
    exported: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    config = (workplace / "models" / model / "config.json").read_bytes()
    assert (folder / "config.json").read_bytes() == config
