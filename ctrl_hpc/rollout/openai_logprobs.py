"""Log-probs as OpenAI's routes give them: by decoded text, with bytes, offsets and the likeliest tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctrl_hpc.rollout.decoding import TopLogprobs

_BYTES: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character of a byte-level vocabulary stands for."""

Scored = tuple[int, float | None, TopLogprobs]
"""A token, its log-prob (none for the first of a prompt) and the likeliest tokens there."""


def pieces(token_ids: Sequence[int], tokenizer: Any) -> list[bytes]:
    """The bytes of each token; those of a byte-level vocabulary need not be whole characters."""
    out = []
    for token, name in zip(token_ids, tokenizer.convert_ids_to_tokens(list(token_ids)), strict=True):
        if name is None:  # the model's vocabulary is padded beyond the tokenizer's
            out.append(b"")
            continue
        text = tokenizer.decode([token])
        raw = bytes(map(_BYTES.get, name)) if _BYTES.keys() >= set(name) else b""  # type: ignore[arg-type]
        out.append(raw if raw.decode(errors="replace") == text else text.encode())
    return out


def shown(piece: bytes) -> str:
    """A token's text; bytes that are no whole character are written as ``\\xf0``."""
    return piece.decode(errors="backslashreplace")


class Offsets:
    """Where in a text each token begins, in characters."""

    def __init__(self, tokenizer: Any, text: str = "", at: int = 0) -> None:
        """``text``: where a special token is told from one that the text does not show; without it none is shown."""
        self._special = set(tokenizer.all_special_ids)
        self._text, self._at = text, at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int, piece: bytes) -> int:
        """The offset of the next token."""
        offset = self._at
        if token not in self._special or (piece and self._text.startswith(piece.decode(errors="replace"), offset)):
            self._at += len(self._decoder.decode(piece))
        return offset


def completion_logprobs(scored: Sequence[Scored], top: int, offsets: Offsets, tokenizer: Any) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/completions``; the sampled token is always among the likeliest."""
    of_tokens = pieces([token for token, _, _ in scored], tokenizer)
    likeliest: list[dict[str, float] | None] = []
    for (_, logprob, tops), piece in zip(scored, of_tokens, strict=True):
        if logprob is None:
            likeliest.append(None)
            continue
        by_text: dict[str, float] = {}
        names = pieces([other for other, _ in tops[:top]], tokenizer)
        for name, (_, value) in zip(names, tops, strict=False):
            by_text.setdefault(shown(name), value)
        by_text.setdefault(shown(piece), logprob)
        likeliest.append(by_text)
    return {
        "tokens": [shown(piece) for piece in of_tokens],
        "token_logprobs": [logprob for _, logprob, _ in scored],
        "top_logprobs": likeliest,
        "text_offset": [offsets.next(item[0], piece) for item, piece in zip(scored, of_tokens, strict=True)],
    }


def chat_logprobs(scored: Sequence[Scored], top: int, tokenizer: Any) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/chat/completions``."""
    content = []
    for (_, logprob, tops), piece in zip(scored, pieces([item[0] for item in scored], tokenizer), strict=True):
        others = zip(pieces([token for token, _ in tops[:top]], tokenizer), tops, strict=False)
        entry = _entry(piece, logprob)
        entry["top_logprobs"] = [_entry(other, value) for other, (_, value) in others]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": shown(piece), "logprob": logprob, "bytes": list(piece)}
