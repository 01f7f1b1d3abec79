"""OpenAI's completion routes over the rollout server: not streamed, ``stop`` strings cut the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from ctrl_hpc.records import Generation, Message
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.decoding import GREEDY_BELOW, Decoding, check_decoding
from ctrl_hpc.rollout.worker import Service


class _Common(BaseModel):
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    user: str | None = None


class CompletionBody(_Common):
    """Body of ``/v1/completions``; ``logprobs`` is any number or none."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None


class ChatMessage(BaseModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(_Common):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Add ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.model, "object": "model", "created": 0, "owned_by": "ctrl-hpc"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> dict[str, Any]:
        prompts = _prompt_ids(body.prompt, service)
        groups = await service.complete(prompts, [_sampling(body, body.max_tokens, service)] * len(prompts))
        choices: list[dict[str, Any]] = []
        for generation, text, reason in _texts(groups, body.stop, service):
            choice = {"index": len(choices), "text": text, "finish_reason": reason, "logprobs": None}
            if body.logprobs is not None:
                pieces = service.tokenizer.convert_ids_to_tokens(list(generation.token_ids))
                choice["logprobs"] = {"tokens": pieces, "token_logprobs": list(generation.logprobs)}
            choices.append(choice)
        return _envelope("text_completion", "cmpl", choices, groups, service)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> dict[str, Any]:
        chat = [Message(role=message.role, content=message.content) for message in body.messages]
        ids = chat_ids(
            service.tokenizer,
            chat,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        limit = body.max_completion_tokens or body.max_tokens or service.worker.engine.max_positions - len(ids)
        groups = await service.complete([ids], [_sampling(body, max(1, limit), service)])
        choices: list[dict[str, Any]] = []
        for generation, text, reason in _texts(groups, body.stop, service):
            message = {"role": "assistant", "content": text}
            choice = {"index": len(choices), "message": message, "finish_reason": reason, "logprobs": None}
            if body.logprobs:
                pieces = service.tokenizer.convert_ids_to_tokens(list(generation.token_ids))
                pairs = zip(pieces, generation.logprobs, strict=True)
                choice["logprobs"] = {"content": [{"token": token, "logprob": value} for token, value in pairs]}
            choices.append(choice)
        return _envelope("chat.completion", "chatcmpl", choices, groups, service)


def _sampling(body: _Common, max_tokens: int, service: Service) -> Decoding:
    if body.stream:
        raise ValueError("stream=true is not served here")
    temperature = 0.0 if 0.0 <= body.temperature < GREEDY_BELOW else body.temperature
    sampling = Decoding(temperature=temperature, top_p=body.top_p, max_tokens=max_tokens, n=body.n, seed=body.seed)
    check_decoding(sampling, service.worker.engine.vocabulary)
    return sampling


def _prompt_ids(prompt: Any, service: Service) -> list[list[int]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    return [service.tokenizer.encode(item) if isinstance(item, str) else item for item in prompt]


def _texts(
    groups: Sequence[Sequence[Generation]], stop: str | list[str] | None, service: Service
) -> list[tuple[Generation, str, str]]:
    """Completions with their texts, cut at the first stop string, and why they ended."""
    stops = [stop] if isinstance(stop, str) else stop or []
    flat = [generation for group in groups for generation in group]
    out = []
    for generation, text in zip(flat, service.texts(flat), strict=True):
        ends = [at for item in stops if (at := text.find(item)) >= 0]
        reason = "stop" if ends else str(generation.finish_reason)
        out.append((generation, text[: min(ends)] if ends else text, reason))
    return out


def _envelope(
    kind: str, prefix: str, choices: list[dict[str, Any]], groups: Sequence[Sequence[Generation]], service: Service
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
