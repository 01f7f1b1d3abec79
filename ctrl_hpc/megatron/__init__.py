"""Megatron-core for the critic: parallel state, model, Hugging Face weights, optimizer, checkpoints.

On a machine without a GPU, importing this package makes ``cuda`` mean the CPU in this process (see ``cpu``): import it
in processes that train or convert, and nowhere else. Megatron-core warns at import about Transformer Engine and Apex,
which are optional, and about GPTModel, which is pinned on purpose; both are harmless and silenced here.
"""

import logging
import warnings

import torch

warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed\.checkpoint)\.")
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
for _name, _level in {"megatron.core": logging.ERROR, "torch.utils.cpp_extension": logging.ERROR}.items():
    logging.getLogger(_name).setLevel(_level)

if not torch.cuda.is_available():
    from ctrl_hpc.megatron import cpu

    cpu.install()
