"""OpenAI's completion routes over the rollout server, not streamed; fields that are not served are refused by name."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, model_validator
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctrl_hpc.records import Generation, Message
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.decoding import GREEDY_BELOW, Decoding, check_decoding
from ctrl_hpc.rollout.worker import RolloutService, cut, stop_strings

_BYTES: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character of a byte-level vocabulary stands for."""


class _Strict(BaseModel):
    """A body whose unknown fields are refused by name: what is not served is never ignored. Null is not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class _Common(_Strict):
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    user: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []


class CompletionBody(_Common):
    """Body of ``/v1/completions``; ``logprobs`` is any number or none."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None


class TextPart(_Strict):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a chat; null content is empty."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = None

    @property
    def said(self) -> str:
        """Its text, parts put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Common):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def add_openai_routes(app: FastAPI, service: RolloutService) -> None:
    """Add ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.model, "object": "model", "created": 0, "owned_by": "ctrl-hpc"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> dict[str, Any]:
        prompts = _prompt_ids(body.prompt, service)
        sampling, stops = _sampling(body, body.max_tokens, service), stop_strings(body.stop)
        groups = await service.complete(prompts, [sampling] * len(prompts), [stops] * len(prompts))
        choices: list[dict[str, Any]] = []
        for generation, text, reason in _texts(groups, body.stop, service):
            choice = {"index": len(choices), "text": text, "finish_reason": reason, "logprobs": None}
            if body.logprobs is not None:
                pieces = _pieces(generation, service.tokenizer)
                choice["logprobs"] = {
                    "tokens": [_shown(piece) for piece in pieces],
                    "token_logprobs": list(generation.logprobs),
                    "top_logprobs": None,
                    "text_offset": _offsets(generation, pieces, service.tokenizer),
                }
            choices.append(choice)
        return _envelope("text_completion", "cmpl", choices, groups, service)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> dict[str, Any]:
        chat = [Message(role=message.role, content=message.said) for message in body.messages]
        ids = chat_ids(
            service.tokenizer,
            chat,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        limits = (body.max_completion_tokens, body.max_tokens, max(1, service.worker.engine.max_positions - len(ids)))
        limit = next(length for length in limits if length is not None)
        groups = await service.complete([ids], [_sampling(body, limit, service)], [stop_strings(body.stop)])
        choices: list[dict[str, Any]] = []
        for generation, text, reason in _texts(groups, body.stop, service):
            message = {"role": "assistant", "content": text}
            choice = {"index": len(choices), "message": message, "finish_reason": reason, "logprobs": None}
            if body.logprobs:
                pairs = zip(_pieces(generation, service.tokenizer), generation.logprobs, strict=True)
                choice["logprobs"] = {"content": [_entry(piece, logprob) for piece, logprob in pairs]}
            choices.append(choice)
        return _envelope("chat.completion", "chatcmpl", choices, groups, service)


def _sampling(body: _Common, max_tokens: int, service: RolloutService) -> Decoding:
    if body.stream:
        raise ValueError("stream=true is not served here")
    sampling = Decoding(
        temperature=0.0 if 0.0 <= body.temperature < GREEDY_BELOW else body.temperature,
        top_p=body.top_p,
        max_tokens=max_tokens,
        n=body.n,
        seed=body.seed,
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple(body.logit_bias.items()),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids),
    )
    check_decoding(sampling, service.worker.engine.vocabulary)
    return sampling


def _prompt_ids(prompt: Any, service: RolloutService) -> list[list[int]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    return [service.tokenizer.encode(item) if isinstance(item, str) else item for item in prompt]


def _texts(
    groups: Sequence[Sequence[Generation]], stop: str | list[str] | None, service: RolloutService
) -> list[tuple[Generation, str, str]]:
    """Completions with their texts, cut at the first stop string, and why they ended."""
    stops = stop_strings(stop)
    flat = [generation for group in groups for generation in group]
    out = []
    for generation, whole in zip(flat, service.texts(flat), strict=True):
        text, stopped_by = cut(whole, stops)
        out.append((generation, text, str(generation.finish_reason) if stopped_by is None else "stop"))
    return out


def _pieces(generation: Generation, tokenizer: Any) -> list[bytes]:
    """The bytes of each token; those of a byte-level vocabulary need not be whole characters."""
    out = []
    names = tokenizer.convert_ids_to_tokens(list(generation.token_ids))
    for token, name in zip(generation.token_ids, names, strict=True):
        text = tokenizer.decode([token])
        raw = bytes(map(_BYTES.get, name)) if _BYTES.keys() >= set(name) else b""  # type: ignore[arg-type]
        out.append(raw if raw.decode(errors="replace") == text else text.encode())
    return out


def _shown(piece: bytes) -> str:
    """A token's text; bytes that are no whole character are written as ``\\xf0``."""
    return piece.decode(errors="backslashreplace")


def _entry(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(piece), "logprob": logprob, "bytes": list(piece), "top_logprobs": []}


def _offsets(generation: Generation, pieces: Sequence[bytes], tokenizer: Any) -> list[int]:
    """Where in the completion's text each token begins, in characters; special tokens are not in it."""
    special = set(tokenizer.all_special_ids)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, at = [], 0
    for token, piece in zip(generation.token_ids, pieces, strict=True):
        offsets.append(at)
        at += 0 if token in special else len(decoder.decode(piece))
    return offsets


def _envelope(
    kind: str,
    prefix: str,
    choices: list[dict[str, Any]],
    groups: Sequence[Sequence[Generation]],
    service: RolloutService,
) -> dict[str, Any]:
    prompt_tokens = sum(len(group[0].prompt_ids) for group in groups)
    completion_tokens = sum(len(item.token_ids) for group in groups for item in group)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model,
        "choices": choices,
        "usage": usage,
    }
