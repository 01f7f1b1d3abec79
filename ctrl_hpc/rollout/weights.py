"""New weights for a model that is already in memory, from a Hugging Face folder of the same architecture."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ctrl_hpc.rollout import deltas

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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

    A folder may hold a difference (see :mod:`ctrl_hpc.rollout.deltas`). It is applied to what the model holds where
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
        for path in weight_files(here):
            try:
                state.update(load_file(path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: {error}") from None
    for place, difference in reversed(later):
        deltas.apply(place, difference, state, {} if whole else own)
    last = later[0][1] if later else about
    return state, last.state if last is not None else None, whole


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
