"""Chats and critiques as token ids, as the critic's server would make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctrl_hpc.records import Chat, Critique


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """A chat as the critic is asked it."""
    messages = [{"role": message.role, "content": message.content} for message in chat]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def response_ids(tokenizer: Any, critique: Critique) -> Sequence[int]:
    """A critique as the critic would write it, up to the end of its turn."""
    generation = critique.generation
    if generation is not None and generation.token_ids:
        ids = generation.token_ids
        whole = generation.finish_reason == "stop"
    else:
        ids, whole = tuple(tokenizer(critique.text, add_special_tokens=False)["input_ids"]), True
    return (*ids, tokenizer.eos_token_id) if whole and ids[-1:] != (tokenizer.eos_token_id,) else ids
