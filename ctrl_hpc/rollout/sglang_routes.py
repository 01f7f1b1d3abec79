"""SGLang's native routes over the rollout server, as RL frameworks use them; what is not served is refused by name."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, model_validator

from ctrl_hpc.rollout.decoding import GREEDY_BELOW, Completion, Decoding, TopLogprobs, check_decoding
from ctrl_hpc.rollout.openai_logprobs import pieces, shown
from ctrl_hpc.rollout.streaming import TextStream, event_stream
from ctrl_hpc.rollout.worker import Asked, RolloutService, Step, cut, stop_strings

_TEXT = ("skip_special_tokens", "no_stop_trim")
"""SGLang's sampling parameters that say what is shown of a completion: special tokens, the stop string."""
_NEUTRAL = "spaces_between_special_tokens"
"""The one that changes nothing: fast tokenizers put no spaces there."""
_NUMBERS: dict[str, tuple[str, float]] = {
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "frequency_penalty": ("frequency_penalty", 0.0),
    "presence_penalty": ("presence_penalty", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
}
"""SGLang's sampling parameters that are numbers: the field of ``Decoding`` and the default."""
_INTEGERS: dict[str, tuple[str, int]] = {
    "max_new_tokens": ("max_tokens", 128),
    "n": ("n", 1),
    "top_k": ("top_k", 0),
    "min_new_tokens": ("min_tokens", 0),
}
"""... and those that are whole numbers."""
_KNOWN = (*_NUMBERS, *_INTEGERS, "sampling_seed", "stop_token_ids", "ignore_eos", "logit_bias")
_MOST = 1 << 63
"""No number of a request is larger."""
_ALL_TOKENS = frozenset({-1, 1 << 30})
"""Values of ``top_k`` that mean all, beside 0."""


class GenerateBody(BaseModel):
    """Body of ``/generate``: ``text`` or ``input_ids``, single or a list; ``sampling_params`` single or one each."""

    model_config = ConfigDict(extra="forbid")
    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    """From which token on a prompt's log-probs are given; -1: none are."""
    top_logprobs_num: int | list[int] = 0
    """Log-probs of that many likeliest tokens at each position."""
    return_text_in_logprobs: bool = False
    rid: str | list[str] | None = None
    """The request's id, by which it can be aborted."""
    stream: bool = False
    """The text so far, token by token."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Null is what a field is that was not given, known here or not."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class UpdateBody(BaseModel):
    """Body of ``/update_weights_from_disk``; ``weight_version`` is a number, as text or not."""

    model_path: str
    weight_version: int | str | None = None
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class AbortBody(BaseModel):
    """Body of ``/abort_request``."""

    model_config = ConfigDict(extra="forbid")
    rid: str = ""
    abort_all: bool = False
    abort_message: str | None = None


class PauseBody(BaseModel):
    """Body of ``/pause_generation``; what runs is aborted, no other mode is served."""

    model_config = ConfigDict(extra="forbid")
    mode: Literal["abort"] = "abort"


def _sampling_of(params: dict[str, Any], vocabulary: int) -> Decoding:
    """SGLang's sampling parameters; raises ValueError naming the parameter that is not served."""
    given = {key: value for key, value in params.items() if value is not None}
    for key in given:
        if key not in (*_KNOWN, *_TEXT, _NEUTRAL, "stop"):
            raise ValueError(f"sampling_params.{key} is unknown; allowed: {', '.join((*_KNOWN, *_TEXT, 'stop'))}")
    values: dict[str, Any] = {name: _number(given, key, default) for key, (name, default) in _NUMBERS.items()}
    values |= {name: _integer(given, key, default) for key, (name, default) in _INTEGERS.items()}
    if values["top_k"] in _ALL_TOKENS:
        values["top_k"] = 0
    if 0.0 <= values["temperature"] < GREEDY_BELOW:
        values["temperature"] = 0.0
    decoding = Decoding(
        **values,
        seed=_integer(given, "sampling_seed", 0) if "sampling_seed" in given else None,
        stop_token_ids=_ids(given, "stop_token_ids"),
        ignore_eos=_flag(given, "ignore_eos", False),
        logit_bias=logit_bias(given.get("logit_bias", {})),
    )
    check_decoding(decoding, vocabulary)
    return decoding


def logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """OpenAI's map of token ids, as text, to biases."""
    wrong = ValueError(f"logit_bias={value!r}: must map token ids to numbers")
    if not isinstance(value, dict):
        raise wrong
    try:
        return tuple((int(token), _number(value, token, 0.0)) for token in value)
    except (TypeError, ValueError):
        raise wrong from None


def _number(params: dict[str, Any], key: str, default: float) -> float:
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _MOST:
        raise ValueError(f"{key}={value!r}: must be a number")
    return float(value)


def _integer(params: dict[str, Any], key: str, default: int) -> int:
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST:
        raise ValueError(f"{key}={value!r}: must be a whole number")
    return value


def _flag(params: dict[str, Any], key: str, default: bool) -> bool:
    value = params.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: must be true or false")
    return default if value is None else value


def _ids(params: dict[str, Any], key: str) -> tuple[int, ...]:
    value = params.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise ValueError(f"{key}={value!r}: must be a list of token ids")
    return tuple(value)


NOT_SERVED = {
    "release_memory_occupation": "weights stay in memory",
    "resume_memory_occupation": "weights stay in memory",
    "update_weights_from_tensor": "weights come by /update_weights_from_disk",
    "update_weights_from_distributed": "weights come by /update_weights_from_disk",
    "init_weights_update_group": "weights come by /update_weights_from_disk",
    "destroy_weights_update_group": "weights come by /update_weights_from_disk",
    "load_lora_adapter": "one model is served",
    "unload_lora_adapter": "one model is served",
    "encode": "the model generates",
    "classify": "the model generates",
    "open_session": "requests stand alone",
    "close_session": "requests stand alone",
}
"""SGLang's routes that are refused, and why."""


def add_sglang_routes(app: FastAPI, service: RolloutService) -> None:
    """Add ``/generate``, ``/update_weights_from_disk`` and those around them."""
    _add_control_routes(app, service)
    _add_information_routes(app, service)

    @app.post("/generate")
    @app.put("/generate")
    async def generate(body: GenerateBody) -> Any:
        asked = _Native(body, service)
        return await event_stream(asked.chunks()) if body.stream else JSONResponse(await asked.whole())

    @app.post("/update_weights_from_disk")
    async def update_weights(body: UpdateBody) -> JSONResponse:
        version = service.worker.engine.version + 1 if body.weight_version is None else body.weight_version
        if not str(version).isdecimal():
            raise ValueError(f"weight_version={version!r}: must be a whole number")
        if body.abort_all_requests:
            service.worker.abort()
        try:
            await asyncio.wrap_future(service.worker.update(body.model_path, int(version)))
        except ValueError as error:
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0}, status_code=400)
        return JSONResponse({"success": True, "message": f"weight version {version}", "num_paused_requests": 0})

    for name, reason in NOT_SERVED.items():
        app.add_api_route(f"/{name}", _refusal(name, reason), methods=["GET", "POST"])


def _refusal(name: str, reason: str) -> Any:
    async def refuse() -> None:
        raise ValueError(f"{name} is not served here: {reason}")

    return refuse


def _add_control_routes(app: FastAPI, service: RolloutService) -> None:
    @app.post("/abort_request")
    async def abort_request(body: AbortBody) -> PlainTextResponse:
        if not body.rid and not body.abort_all:
            raise ValueError("rid or abort_all=true is needed")
        service.worker.abort(None if body.abort_all else body.rid)
        return PlainTextResponse("")

    @app.post("/pause_generation")
    async def pause_generation(body: PauseBody = PauseBody()) -> dict[str, str]:  # noqa: B008
        service.worker.pause()
        return {"status": "ok", "message": "Generation paused successfully."}

    @app.post("/continue_generation")
    async def continue_generation() -> dict[str, str]:
        service.worker.go_on()
        return {"status": "ok", "message": "Generation continued successfully."}

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> PlainTextResponse:
        service.worker.engine.forget()
        return PlainTextResponse("Cache flushed.\n")


def _add_information_routes(app: FastAPI, service: RolloutService) -> None:
    engine = service.worker.engine

    @app.get("/health_generate")
    async def health_generate() -> Any:
        """Whether a token can be generated."""
        if service.worker.paused:
            return PlainTextResponse("")
        asked = Asked(prompt=[0], decoding=Decoding(temperature=0.0, max_tokens=1))
        try:
            await service.complete([asked])
        except RuntimeError as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=503)
        return PlainTextResponse("")

    @app.get("/get_weight_version")
    @app.get("/weight_version")
    async def weight_version() -> dict[str, str]:
        return {"weight_version": str(engine.version)}

    def model() -> dict[str, Any]:
        path = service.model
        version = str(engine.version)
        return {"model_path": path, "tokenizer_path": path, "is_generation": True, "weight_version": version}

    @app.get("/get_model_info")
    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        return model()

    @app.get("/get_load")
    @app.get("/v1/loads")
    async def loads() -> dict[str, Any]:
        """Completions asked for and not answered, as a trainer looks at that waits until a server is idle."""
        count = service.worker.unanswered
        return {"loads": [{"dp_rank": 0, "num_total_reqs": count}], "num_reqs": count}

    @app.get("/get_server_info")
    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        return {
            **model(),
            "served_model_name": service.model,
            "context_length": engine.max_positions,
            "vocab_size": engine.vocabulary,
            "tp_size": 1,
            "dp_size": 1,
            "paused": service.worker.paused,
            "waiting": service.worker.waiting,
            "version": f"ctrl-hpc {metadata.version('ctrl-hpc')}",
        }


class _Native:
    """What one ``/generate`` is answered, at once or in chunks."""

    def __init__(self, body: GenerateBody, service: RolloutService) -> None:
        self.body, self.service = body, service
        prompts, self.single = _prompts(body, service)
        count = len(prompts)
        params = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params] * count
        if len(params) != count:
            raise ValueError(f"{count} prompts, but {len(params)} sampling_params")
        self.with_logprobs = _each("return_logprob", body.return_logprob, count)
        self.starts = _each("logprob_start_len", body.logprob_start_len, count)
        tops = _each("top_logprobs_num", body.top_logprobs_num, count)
        rids = _each("rid", body.rid or [uuid.uuid4().hex for _ in prompts], count)
        self.asked = []
        for i, prompt in enumerate(prompts):
            if self.starts[i] < -1 or self.starts[i] > len(prompt):
                raise ValueError(f"logprob_start_len={self.starts[i]}: must be in [-1, {len(prompt)}]")
            decoding = _sampling_of(params[i], service.worker.engine.vocabulary)
            asks = self.with_logprobs[i]
            top, scores = (tops[i], self.starts[i] >= 0) if asks else (0, False)
            decoding = replace(decoding, top_logprobs=top, prompt_logprobs=scores)
            check_decoding(decoding, service.worker.engine.vocabulary)
            stops = stop_strings(params[i].get("stop"))
            self.asked.append(Asked(prompt=prompt, decoding=decoding, stops=stops, rid=rids[i]))
        self.skips = [_flag(item, "skip_special_tokens", True) for item in params]
        self.shows_stop = [_flag(item, "no_stop_trim", False) for item in params]
        self.single = self.single and self.asked[0].decoding.n == 1

    async def whole(self) -> Any:
        """An answer, or a list of them."""
        out = self._answers(await self.service.complete(self.asked))
        return out[0] if self.single else out

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Answers so far, with their ``index`` where there are several."""
        flat = [(i, item) for i, item in enumerate(self.asked) for _ in range(item.decoding.n)]
        tokenizer = self.service.tokenizer
        texts = [
            TextStream(tokenizer, () if self.shows_stop[i] else item.stops, skip_special_tokens=self.skips[i])
            for i, item in flat
        ]
        steps: list[list[Step]] = [[] for _ in flat]
        async for step in self.service.stream(self.asked):
            if isinstance(step, Step):
                texts[step.index].add(step.token)
                steps[step.index].append(step)
                i, item = flat[step.index]
                so_far = Completion(
                    text="",
                    prompt_ids=tuple(item.prompt),
                    token_ids=tuple(one.token for one in steps[step.index]),
                    logprobs=tuple(one.logprob for one in steps[step.index]),
                    top_logprobs=tuple(one.top for one in steps[step.index]),
                    version=self.service.worker.engine.version,
                )
                answer = self._answer(i, so_far, texts[step.index].sent, None)
                yield answer if self.single else {**answer, "index": step.index}
                continue
            for index, answer in enumerate(self._answers(step)):
                yield answer if self.single else {**answer, "index": index}

    def _answers(self, groups: Sequence[Sequence[Completion]]) -> list[dict[str, Any]]:
        out = []
        for i, group in enumerate(groups):
            for completion in group:
                ids = list(completion.token_ids)
                whole = self.service.tokenizer.decode(ids, skip_special_tokens=self.skips[i])
                text, stopped_by = cut(whole, self.asked[i].stops)
                if stopped_by is not None and self.shows_stop[i]:
                    text += stopped_by
                out.append(self._answer(i, completion, text, _finish(completion, stopped_by)))
        return out

    def _answer(self, i: int, completion: Completion, text: str, finish: dict[str, Any] | None) -> dict[str, Any]:
        tokens = list(completion.token_ids)
        meta: dict[str, Any] = {
            "id": self.asked[i].rid,
            "finish_reason": finish,
            "prompt_tokens": len(completion.prompt_ids),
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_version": str(completion.version),
        }
        if self.with_logprobs[i]:
            meta |= self._logprobs(i, completion)
        return {"text": text, "output_ids": tokens, "meta_info": meta}

    def _logprobs(self, i: int, completion: Completion) -> dict[str, Any]:
        decoding, start, prompt = self.asked[i].decoding, self.starts[i], completion.prompt_ids
        out: dict[str, Any] = {"output_token_logprobs": self._triples(completion.logprobs, completion.token_ids)}
        if decoding.top_logprobs:
            out["output_top_logprobs"] = [self._likeliest(top) for top in completion.top_logprobs]
        if start >= 0 and completion.prompt_logprobs:  # the first that is given has none, as with SGLang
            values = [None, *completion.prompt_logprobs[start:]][: len(prompt) - start]
            out["input_token_logprobs"] = self._triples(values, prompt[start:])
            if decoding.top_logprobs:
                tops = [None, *map(self._likeliest, completion.prompt_top_logprobs[start:])]
                out["input_top_logprobs"] = tops[: len(prompt) - start]
        elif start >= 0:
            out["input_token_logprobs"] = self._triples([None] * len(prompt[start : start + 1]), prompt[start:])
        return out

    def _likeliest(self, top: TopLogprobs) -> list[tuple[float | None, int, str | None]]:
        return self._triples([value for _, value in top], [token for token, _ in top])

    def _triples(
        self, values: Sequence[float | None], tokens: Sequence[int]
    ) -> list[tuple[float | None, int, str | None]]:
        texts: list[str | None] = [None] * len(tokens)
        if self.body.return_text_in_logprobs:
            texts = [shown(piece) for piece in pieces(tokens, self.service.tokenizer)]
        return list(zip(values, tokens, texts, strict=True))


def _prompts(body: GenerateBody, service: RolloutService) -> tuple[list[Sequence[int]], bool]:
    """The prompts, and whether one alone was given."""
    if (body.text is None) == (body.input_ids is None):
        raise ValueError("exactly one of text and input_ids is needed")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        if not texts:
            raise ValueError("text: is empty")
        encoded = [service.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return encoded, isinstance(body.text, str)
    single = not body.input_ids or isinstance(body.input_ids[0], int)
    return [body.input_ids] if single else body.input_ids, single  # type: ignore[list-item,return-value]


def _each(name: str, value: Any, count: int) -> list[Any]:
    """A value for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{count} prompts, but {len(value)} values of {name}")
    return value


def _finish(completion: Completion, stopped_by: str | None) -> dict[str, Any]:
    if completion.finish_reason == "stop":
        return {"type": "stop", "matched": completion.matched if stopped_by is None else stopped_by}
    if completion.finish_reason == "abort":
        return {"type": "abort", "message": "aborted"}
    return {"type": "length", "length": len(completion.token_ids)}
