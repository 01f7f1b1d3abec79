"""LoRA in Megatron is PEFT's: gradients, folders, merged weights; the same steps and checkpoints in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LAYOUTS, MODELS
from megatron_jobs import sequences, spawn
from safetensors.torch import load_file
from torch.nn import functional

from ctrl_hpc.rollout.engine import PaddedEngine, load_engine
from ctrl_hpc.rollout.weights import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, merged

pytestmark = pytest.mark.slow
ALL_LAYOUTS = [layout for layouts in LAYOUTS.values() for layout in layouts]


@pytest.fixture(scope="module")
def found(workplace: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What each model gave in each layout; the checkpoints of two ranks are there for one."""
    for ranks in (2, 1):
        spawn("adapters", "check", workplace, ranks)
    return {
        (model, layout): torch.load(workplace / f"lora-{model}-{layout}.pt")
        for model in MODELS
        for layout in ALL_LAYOUTS
    }


@pytest.fixture(scope="module")
def expected(workplace: Path, found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Loss and gradients by PEFT, of the adapters that a single rank has written."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = {}
    for name in MODELS:
        base = AutoModelForCausalLM.from_pretrained(workplace / "models" / name, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, workplace / "adapters" / f"{name}-single", is_trainable=True)
        pairs = sequences(base.config.vocab_size)
        losses = []
        for prompt, response in pairs:
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            losses.append(functional.cross_entropy(logits, torch.tensor(response), reduction="sum"))
        loss = sum(losses) / sum(len(response) for _, response in pairs)
        loss.backward()
        gradients = {
            key.removeprefix(ADAPTER_PREFIX).replace(".default", ""): value.grad
            for key, value in model.named_parameters()
            if value.requires_grad
        }
        out[name] = {"loss": loss.item(), "gradients": gradients}
    return out


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual - reference).norm() / reference.norm())


# with a distributed optimizer each rank holds a part of the gradients; its steps are compared below
@pytest.mark.parametrize("layout", [layout for layout in ALL_LAYOUTS if layout != "dp2"])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_equal_those_of_peft(
    found: dict[tuple[str, str], dict[str, Any]], expected: dict[str, dict[str, Any]], model: str, layout: str
) -> None:
    ours, theirs = found[model, layout], expected[model]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    assert {name: e for name, g in theirs["gradients"].items() if (e := error(ours["gradients"][name], g)) > 1e-5} == {}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_adapters_alone_are_trained_alike_in_every_layout(
    found: dict[tuple[str, str], dict[str, Any]], model: str, layout: str
) -> None:
    ours, single = found[model, layout], found[model, "single"]
    assert ours["trained"] == ours["adapters"] > 0
    assert ours["optimized"] <= ours["trained"]  # a distributed optimizer has a part
    assert ours["fresh"].keys() == single["fresh"].keys()
    for name, value in single["fresh"].items():
        assert torch.equal(ours["fresh"][name], value) and value.any() == ("lora_A" in name)
    assert [step["loss"] for step in ours["steps"]] == pytest.approx([s["loss"] for s in single["steps"]], rel=1e-5)
    assert ours["steps"][0]["grad_norm"] == pytest.approx(single["steps"][0]["grad_norm"], rel=1e-5)
    assert ours["steps"][-1]["loss"] < ours["steps"][0]["loss"]
    assert ours["reference_error"] == 0.0
    if layout == "tp2":  # its checkpoint, read by one rank, goes on as two do
        assert single["continued"]["loss"] == pytest.approx(ours["continued"]["loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_server_merges_published_adapters(
    found: dict[tuple[str, str], dict[str, Any]], workplace: Path, model: str, layout: str
) -> None:
    folder = workplace / "adapters" / f"{model}-{layout}"
    described = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert described["base_model_name_or_path"] == str(workplace / "models" / model)
    assert described["r"] == MODELS[model].rank and described["lora_alpha"] == MODELS[model].alpha
    engine = load_engine(str(workplace / "models" / model), device="cpu")
    assert isinstance(engine, PaddedEngine)
    engine.load_weights(str(folder), 1)
    files = (workplace / "merged" / f"{model}-{layout}").glob("*.safetensors")
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    served, base = engine.model.state_dict(), load_file(workplace / "models" / model / "model.safetensors")
    assert ours.keys() == base.keys()
    for name, tensor in ours.items():
        assert torch.allclose(served[name], tensor, rtol=0, atol=1e-6)
        changed = any(f".{module}.weight" in name for module in MODELS[model].targets)
        assert torch.equal(tensor, base[name]) != changed


def test_adapters_that_do_not_fit_are_refused_in_one_line(workplace: Path, tmp_path: Path, found: Any) -> None:
    source = workplace / "adapters" / "qwen2-tied-single"
    told = json.loads((source / ADAPTER_CONFIG).read_text())
    other = workplace / "models" / "qwen3-untied"
    for change, message in {
        ("use_dora", True): "use_dora=True is not supported",
        ("base_model_name_or_path", str(other)): "does not fit",
        ("r", None): "r: missing",
    }.items():
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(told | dict([change])))
        (tmp_path / ADAPTER_WEIGHTS).write_bytes((source / ADAPTER_WEIGHTS).read_bytes())
        with pytest.raises(ValueError, match=message):
            merged(tmp_path)
