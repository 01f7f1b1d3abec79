"""Answers that come while they are written: text from tokens, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

_UNFINISHED = "�"
"""What the bytes of an unfinished character are decoded to."""


class TextStream:
    """The text that a completion's tokens add, in whole characters, without what may become a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._stops, self._skip = tokenizer, tuple(stops), skip_special_tokens
        self._ids: list[int] = []
        self._from = self._read = 0  # tokens before `_read` are said; those from `_from` are the next ones' context
        self._said = ""
        self.sent = ""

    def add(self, token: int) -> str:
        """What can be sent now."""
        self._ids.append(token)
        known, whole = self._decode(self._read), self._decode(len(self._ids))
        if whole.endswith(_UNFINISHED) or len(whole) <= len(known):
            return ""
        self._said += whole[len(known) :]
        self._from, self._read = self._read, len(self._ids)
        return self._send(self._said[: _safe(self._said, self._stops)])

    def end(self, text: str) -> str:
        """What is left of the whole completion's text."""
        return self._send(text)

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=self._skip)

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent += new
        return new


def _safe(text: str, stops: Sequence[str]) -> int:
    """How much of ``text`` comes before any stop string, whole or begun at its end."""
    ends = [len(text)]
    for stop in stops:
        found = text.find(stop)
        begun = (len(text) - n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
        ends.append(found if found >= 0 else next(begun, len(text)))
    return min(ends)


async def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Server-sent events, ``[DONE]`` last. What goes wrong before the first chunk is raised, later it is an event."""
    first = await anext(chunks)

    async def events() -> AsyncIterator[str]:
        async with aclosing(chunks):  # type: ignore[type-var]
            yield _event(first)
            try:
                async for chunk in chunks:
                    yield _event(chunk)
            except (ValueError, RuntimeError) as error:
                yield _event({"error": {"message": str(error)}})
            yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
