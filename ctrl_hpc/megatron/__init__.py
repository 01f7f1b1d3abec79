"""Megatron-core for the critic: parallel state, model, Hugging Face weights, optimizer, checkpoints.

Megatron-core warns at import about Transformer Engine and Apex, which are optional, and about GPTModel, which is
pinned on purpose; both are harmless, so this package silences them before its first import.
"""

import logging
import warnings

warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
