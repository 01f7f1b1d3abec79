"""OpenAI's completion routes over the rollout server; fields that are not served are refused by name."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctrl_hpc.records import Message
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.decoding import GREEDY_BELOW, Completion, Decoding, check_decoding
from ctrl_hpc.rollout.openai_logprobs import Offsets, Scored, chat_logprobs, completion_logprobs
from ctrl_hpc.rollout.streaming import TextStream, event_stream
from ctrl_hpc.rollout.worker import Asked, RolloutService, Step, cut, stop_strings


class _Strict(BaseModel):
    """A body whose unknown fields are refused by name: what is not served is never ignored. Null is not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Strict):
    """``stream_options``."""

    include_usage: bool = False


class _Common(_Strict):
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
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
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None
    """Log-probs of that many likeliest tokens at each position, beside the token's own."""
    echo: bool = False
    """The prompt comes before the completion, in its text and its log-probs."""


class TextPart(_Strict):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a chat; null content is empty."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = None
    type: Literal["text"] = "text"
    """As lm-eval sends it."""

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
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Log-probs of that many likeliest tokens at each position; asks for ``logprobs``."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def add_openai_routes(app: FastAPI, service: RolloutService) -> None:
    """Add ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""
    entry = {"id": service.model, "object": "model", "created": 0, "owned_by": "ctrl-hpc"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name.strip("/") != service.model.strip("/"):
            message = f"model: {name!r} is not served here; allowed: {service.model}"
            return JSONResponse({"error": {"message": message, "code": "model_not_found"}}, status_code=404)
        return entry

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Any:
        answer = _CompletionAnswer(body, service)
        if body.stream:
            return await event_stream(answer.chunks())
        return answer.whole(await service.complete(answer.asked))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Any:
        answer = _ChatAnswer(body, service)
        if body.stream:
            return await event_stream(answer.chunks())
        return answer.whole(await service.complete(answer.asked))


class _Answer(ABC):
    """What one request is answered, at once or in chunks."""

    kind: str
    prefix: str
    with_logprobs: bool

    def __init__(self, body: _Common, asked: Sequence[Asked], service: RolloutService) -> None:
        self.body, self.asked, self.service = body, asked, service
        self.stops = stop_strings(body.stop)
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @abstractmethod
    def choice(self, index: int, completion: Completion, text: str, reason: str) -> dict[str, Any]:
        """A choice of an answer that comes at once."""

    @abstractmethod
    def part(self, index: int, text: str, scored: Sequence[Scored], reason: str | None) -> dict[str, Any]:
        """A choice of a chunk."""

    def whole(self, groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The answer that comes at once."""
        flat = [completion for group in groups for completion in group]
        choices = [self.choice(index, item, *ended) for index, (item, ended) in enumerate(self._ended(flat))]
        return {**self._envelope(self.kind, choices), "usage": _usage(groups)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        count = sum(item.decoding.n for item in self.asked)
        texts = [TextStream(self.service.tokenizer, self.stops) for _ in range(count)]
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        async for step in self.service.stream(self.asked):
            if isinstance(step, Step):
                new = texts[step.index].add(step.token)
                scored: list[Scored] = [(step.token, step.logprob, step.top)]
                if new or self.with_logprobs:
                    yield self._chunk([self.part(step.index, new, scored, None)]) | usage
                continue
            flat = [completion for group in step for completion in group]
            for index, (_, (text, reason)) in enumerate(self._ended(flat)):
                yield self._chunk([self.part(index, texts[index].end(text), [], reason)]) | usage
            if usage:
                yield self._chunk([]) | {"usage": _usage(step)}

    def _ended(self, flat: Sequence[Completion]) -> list[tuple[Completion, tuple[str, str]]]:
        """Completions with their texts, cut at the first stop string, and why they ended."""
        out = []
        for completion, whole in zip(flat, self.service.texts(flat), strict=True):
            text, stopped_by = cut(whole, self.stops)
            out.append((completion, (text, str(completion.finish_reason) if stopped_by is None else "stop")))
        return out

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope(self.kind if self.kind == "text_completion" else f"{self.kind}.chunk", choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.model,
            "choices": choices,
        }


class _CompletionAnswer(_Answer):
    kind, prefix = "text_completion", "cmpl"

    def __init__(self, body: CompletionBody, service: RolloutService) -> None:
        if body.echo and body.stream:
            raise ValueError("echo=true is not served with stream=true")
        self.top, self.with_logprobs = body.logprobs or 0, body.logprobs is not None
        decoding = _decoding(body, body.max_tokens, self.top, service)
        decoding = replace(decoding, prompt_logprobs=body.echo and self.with_logprobs)
        prompts = _prompt_ids(body.prompt, service)
        stops = stop_strings(body.stop)
        super().__init__(body, [Asked(prompt=ids, decoding=decoding, stops=stops) for ids in prompts], service)
        self.before = _prompt_texts(body.prompt, prompts, service) if body.echo else None
        self.offsets: dict[int, Offsets] = {}

    def choice(self, index: int, completion: Completion, text: str, reason: str) -> dict[str, Any]:
        before = "" if self.before is None else self.before[index // self.body.n]
        choice = {"index": index, "text": before + text, "finish_reason": reason, "logprobs": None}
        if self.with_logprobs:
            tokenizer = self.service.tokenizer
            scored = _scored(completion)
            if self.before is not None:
                first: Scored = (completion.prompt_ids[0], None, ())
                scored = [first, *_prompt_scored(completion), *scored]
            choice["logprobs"] = completion_logprobs(scored, self.top, Offsets(tokenizer, before), tokenizer)
        return choice

    def part(self, index: int, text: str, scored: Sequence[Scored], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if self.with_logprobs and scored:
            tokenizer = self.service.tokenizer
            offsets = self.offsets.setdefault(index, Offsets(tokenizer))
            choice["logprobs"] = completion_logprobs(scored, self.top, offsets, tokenizer)
        return choice


class _ChatAnswer(_Answer):
    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, body: ChatBody, service: RolloutService) -> None:
        if body.top_logprobs and not body.logprobs:
            raise ValueError("top_logprobs asks for logprobs=true")
        if not body.messages:
            raise ValueError("messages: is empty")
        chat = [Message(role=message.role, content=message.said) for message in body.messages]
        ids = chat_ids(
            service.tokenizer,
            chat,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        limits = (body.max_completion_tokens, body.max_tokens, max(1, service.worker.engine.max_positions - len(ids)))
        limit = next(length for length in limits if length is not None)
        decoding = _decoding(body, limit, body.top_logprobs, service)
        super().__init__(body, [Asked(prompt=ids, decoding=decoding, stops=stop_strings(body.stop))], service)
        self.top, self.with_logprobs = body.top_logprobs, body.logprobs
        self.begun: set[int] = set()

    def choice(self, index: int, completion: Completion, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": None}
        if self.with_logprobs:
            choice["logprobs"] = chat_logprobs(_scored(completion), self.top, self.service.tokenizer)
        return choice

    def part(self, index: int, text: str, scored: Sequence[Scored], reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        if index not in self.begun:
            self.begun.add(index)
            delta = {"role": "assistant", "content": text}
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        if self.with_logprobs and scored:
            choice["logprobs"] = chat_logprobs(scored, self.top, self.service.tokenizer)
        return choice


def _scored(completion: Completion) -> list[Scored]:
    tops = completion.top_logprobs or [()] * len(completion.token_ids)
    return list(zip(completion.token_ids, completion.logprobs, tops, strict=True))


def _prompt_scored(completion: Completion) -> list[Scored]:
    """The prompt's tokens but the first."""
    tops = completion.prompt_top_logprobs or [()] * len(completion.prompt_logprobs)
    return list(zip(completion.prompt_ids[1:], completion.prompt_logprobs, tops, strict=True))


def _decoding(body: _Common, max_tokens: int, top_logprobs: int, service: RolloutService) -> Decoding:
    decoding = Decoding(
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
        top_logprobs=top_logprobs,
    )
    check_decoding(decoding, service.worker.engine.vocabulary)
    return decoding


def _prompt_ids(prompt: Any, service: RolloutService) -> list[list[int]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise ValueError("prompt: is empty")
    if isinstance(prompt[0], int):
        prompt = [prompt]
    return [service.tokenizer.encode(item) if isinstance(item, str) else item for item in prompt]


def _prompt_texts(prompt: Any, prompts: Sequence[Sequence[int]], service: RolloutService) -> list[str]:
    """The prompts as they are echoed: the texts that were given, or what the ids say."""
    given = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(given[0], str):
        return list(given)
    return [service.tokenizer.decode(list(ids)) for ids in prompts]


def _usage(groups: Sequence[Sequence[Completion]]) -> dict[str, int]:
    prompt_tokens = sum(len(group[0].prompt_ids) for group in groups)
    completion_tokens = sum(len(item.token_ids) for group in groups for item in group)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
