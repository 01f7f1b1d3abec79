"""New weights for a model that is already in memory, from a Hugging Face folder of the same architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ctrl_hpc.rollout import deltas

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PREFIX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
"""Files of a folder with LoRA adapters in PEFT's format, and what is before the names of its tensors."""
_PLAIN = {"peft_type": "LORA", "bias": "none"}
"""What an adapter that is merged must say of itself."""
_VARIANTS = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
"""What an adapter that is merged must not ask for."""


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; raises ValueError when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no model folder {folder}")
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{gguf_hint(folder)}")


def stored_dtype(folder: str | Path) -> str:
    """The precision of a folder's first tensor, as safetensors names it: F32, BF16, F16, ..."""
    file = weight_files(folder)[0]
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return str(tensors.get_slice(next(iter(tensors.keys()))).get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {error}") from None


def has_bfloat16_weights(folder: str | Path) -> bool:
    """Whether a folder holds weights in bfloat16; one without weights, or that does not exist, does not."""
    try:
        return stored_dtype(folder) == "BF16"
    except ValueError:
        return False


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own; elsewhere it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # type: ignore[attr-defined]


def gguf_hint(folder: str | Path) -> str:
    """What to do with a folder that holds GGUF files instead, to be put behind a message; empty for others."""
    files = sorted(path.name for path in Path(folder).glob("*.gguf"))
    return f"; {files[0]} is converted as docs/your-models.md says (GGUF)" if files else ""


def copy_weights(model: torch.nn.Module, folder: str | Path, held: str | None = None) -> str | None:
    """Copy a folder's weights into the parameters of ``model``, in place; their state, where the folder names it.

    A folder may hold LoRA adapters in PEFT's format, which are merged into the weights of the folder that they name as
    their base, or a difference (see :mod:`ctrl_hpc.rollout.deltas`). That is applied to what the model holds where
    that is its base, of the state ``held``; else those before it are applied first, from the last whole folder on.
    All names and shapes are checked before anything is copied: on ValueError the model is as it was.
    """
    own = dict(model.state_dict())
    state, found, whole = _new_state(own, Path(folder), held)
    tied = _tied_names(own)
    for name in sorted(set(own) - set(state)) if whole else ():
        if not any(other in state for other in tied[name]):
            raise ValueError(f"{folder}: weight {name} is missing")
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"{folder}: weight {name} is not part of the served model")
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the served model's is {tuple(own[name].shape)}"
            raise ValueError(f"{folder}: weight {name} has shape {shapes}")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return found


def _new_state(
    own: dict[str, torch.Tensor], folder: Path, held: str | None
) -> tuple[dict[str, torch.Tensor], str | None, bool]:
    """The tensors that a folder's version changes, its state, and whether they are all that there are."""
    if not folder.is_dir():
        raise ValueError(f"no model folder {folder}")
    if (folder / ADAPTER_CONFIG).is_file():
        return merged(folder), None, True
    later: list[tuple[Path, deltas.About]] = []
    here, about = folder, deltas.About.read(folder)
    while about is not None and about.base is not None:
        later.append((here, about))
        if held is not None and about.base_state == held and _holds_exactly(own, about):
            break
        here = here.with_name(about.base)
        if not here.is_dir():
            raise ValueError(f"{folder}: is a difference to {here}, which is gone")
        base_state, about = about.base_state, deltas.About.read(here)
        if about is None or about.state != base_state:
            raise ValueError(f"{folder}: is a difference to other weights than {here} holds now")
    whole = about is None or about.base is None
    state: dict[str, torch.Tensor] = {}
    if whole:
        state = _read(weight_files(here))
    for place, difference in reversed(later):
        deltas.apply(place, difference, state, {} if whole else own)
    last = later[0][1] if later else about
    return state, last.state if last is not None else None, whole


def _read(files: list[Path]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            state.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
    return state


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the base of a folder's LoRA adapters with those in them: W + (alpha / r) B A, in W's precision.

    Raises ValueError for adapters that are broken, of another base, or of a kind that is not supported.
    """
    told = _adapter_config(folder / ADAPTER_CONFIG)
    scale = float(told["lora_alpha"]) / int(told["r"])
    state = _read(weight_files(told["base_model_name_or_path"]))
    adapters = _read([folder / ADAPTER_WEIGHTS])
    for name in sorted({name.partition(".lora_")[0] for name in adapters}):
        weight = f"{name.removeprefix(ADAPTER_PREFIX)}.weight"
        A, B = (adapters.get(f"{name}.lora_{side}.weight") for side in "AB")
        if A is None or B is None or weight not in state or (B.shape[0], A.shape[1]) != tuple(state[weight].shape):
            raise ValueError(f"{folder}: adapter {name} does not fit {told['base_model_name_or_path']}")
        state[weight] = (state[weight].float() + scale * B.float() @ A.float()).to(state[weight].dtype)
    return state


def _adapter_config(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        asked = [key for key in _VARIANTS if told.get(key)]
        asked += [key for key, value in _PLAIN.items() if told.get(key) != value]
        missing = [key for key in ("r", "lora_alpha", "base_model_name_or_path") if not told.get(key)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    if asked or missing:
        raise ValueError(
            f"{file}: {asked[0]}={told.get(asked[0])!r} is not supported" if asked else f"{file}: {missing[0]}: missing"
        )
    return told


def _holds_exactly(own: dict[str, torch.Tensor], about: deltas.About) -> bool:
    """Whether the model's tensors have all bits of those that a difference changes: it may be served in fewer."""
    told = {name: getattr(torch, str(item["dtype"])) for name, item in (about.tensors or {}).items() if name in own}
    return all(torch.promote_types(own[name].dtype, dtype) == own[name].dtype for name, dtype in told.items())


def _tied_names(state: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """For each name, the names of entries that share its memory (tied embeddings)."""
    by_memory: dict[tuple[int, torch.Size], set[str]] = {}
    for name, tensor in state.items():
        by_memory.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    return {name: by_memory[(tensor.data_ptr(), tensor.shape)] - {name} for name, tensor in state.items()}
