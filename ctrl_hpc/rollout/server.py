"""The rollout server: SGLang's native routes and OpenAI's, over one model.

Native: ``/generate`` (token ids or text in; text, token ids and log-probs out; lists are batches),
``/update_weights_from_disk``, ``/get_weight_version``, ``/get_model_info``, ``/health``, ``/metrics``.
OpenAI: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/models`` (``ctrl_hpc.rollout.openai_routes``).
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, model_validator

from ctrl_hpc.rollout.decoding import GREEDY_BELOW, Completion, Decoding, check_decoding
from ctrl_hpc.rollout.openai_routes import add_openai_routes
from ctrl_hpc.rollout.worker import RolloutService, Worker, cut, stop_strings
from ctrl_hpc.service import http as http_service

MAX_BODY_BYTES = 1 << 28
"""Largest request."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "no_stop_trim": (True, False),
}
"""Sampling parameters of SGLang that this server accepts only where they change nothing."""
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
    logprob_start_len: int | list[int] | None = None
    rid: str | list[str] | None = None
    stream: bool = False

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


def _sampling_of(params: dict[str, Any], vocabulary: int) -> Decoding:
    """SGLang's sampling parameters; raises ValueError naming the parameter that is not served."""
    given = {key: value for key, value in params.items() if value is not None}
    for key, value in given.items():
        if key in _KNOWN or key == "stop":
            continue
        if key not in _NEUTRAL:
            raise ValueError(f"sampling_params.{key} is unknown; allowed: {', '.join(_KNOWN)}")
        if value not in _NEUTRAL[key]:
            raise ValueError(f"sampling_params.{key}={value!r} is not served here")
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
        ignore_eos=_flag(given, "ignore_eos"),
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


def _flag(params: dict[str, Any], key: str) -> bool:
    value = params.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: must be true or false")
    return value


def _ids(params: dict[str, Any], key: str) -> tuple[int, ...]:
    value = params.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise ValueError(f"{key}={value!r}: must be a list of token ids")
    return tuple(value)


def create_app(service: RolloutService) -> FastAPI:
    """The HTTP application over a service."""
    app = FastAPI(title="ctrl-hpc rollout server", docs_url=None, redoc_url=None)

    @app.exception_handler(ValueError)
    async def bad_value(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": {"message": f"{where}: {first['msg']}"}}, status_code=400)

    @app.exception_handler(RuntimeError)
    async def fault(_: Request, error: RuntimeError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=500)

    @app.post("/generate")
    async def generate(body: GenerateBody) -> Any:
        return await _generate(service, body)

    @app.post("/update_weights_from_disk")
    async def update_weights(body: UpdateBody) -> JSONResponse:
        version = service.worker.engine.version + 1 if body.weight_version is None else int(body.weight_version)
        try:
            await asyncio.wrap_future(service.worker.update(body.model_path, version))
        except ValueError as error:
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0}, status_code=400)
        return JSONResponse({"success": True, "message": f"weight version {version}", "num_paused_requests": 0})

    @app.get("/get_weight_version")
    async def weight_version() -> dict[str, str]:
        return {"weight_version": str(service.worker.engine.version)}

    @app.get("/get_model_info")
    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        version = str(service.worker.engine.version)
        model = service.model
        return {"model_path": model, "tokenizer_path": model, "is_generation": True, "weight_version": version}

    @app.get("/health")
    async def health() -> Any:
        if not service.worker.alive:
            return JSONResponse({"status": "dead", "detail": "the model's thread has ended"}, status_code=503)
        return {"status": "ok", "weight_version": str(service.worker.engine.version), "waiting": service.worker.waiting}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_metrics(service))

    add_openai_routes(app, service)
    return app


async def _generate(service: RolloutService, body: GenerateBody) -> Any:
    if body.stream:
        raise ValueError("stream=true is not served here")
    if (body.text is None) == (body.input_ids is None):
        raise ValueError("exactly one of text and input_ids is needed")
    if body.text is not None:
        single = isinstance(body.text, str)
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts = [service.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        single = not body.input_ids or isinstance(body.input_ids[0], int)
        prompts = [body.input_ids] if single else body.input_ids  # type: ignore[list-item,assignment]
    params = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
    sampling = [_sampling_of(item, service.worker.engine.vocabulary) for item in params]
    stops = [stop_strings(item.get("stop")) for item in params]
    groups = await service.complete(prompts, sampling, stops)
    flat = [generation for group in groups for generation in group]
    with_logprobs = body.return_logprob if isinstance(body.return_logprob, bool) else any(body.return_logprob)
    texts = service.texts(flat)
    ends = [ends for ends, group in zip(stops, groups, strict=True) for _ in group]
    out = [_native(item, *cut(text, end), with_logprobs) for item, text, end in zip(flat, texts, ends, strict=True)]
    return JSONResponse(out[0] if single and sampling[0].n == 1 else out)


def _native(generation: Completion, text: str, stopped_by: str | None, with_logprobs: bool) -> dict[str, Any]:
    tokens = list(generation.token_ids)
    if generation.finish_reason == "stop":
        matched = generation.matched if stopped_by is None else stopped_by
        finish: dict[str, Any] = {"type": "stop", "matched": matched}
    elif generation.finish_reason == "abort":
        finish = {"type": "abort", "message": "aborted"}
    else:
        finish = {"type": "length", "length": len(tokens)}
    meta: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "finish_reason": finish,
        "prompt_tokens": len(generation.prompt_ids),
        "completion_tokens": len(tokens),
        "weight_version": str(generation.version),
    }
    if with_logprobs:
        pairs = zip(generation.logprobs, tokens, strict=True)
        meta["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
    return {"text": text, "output_ids": tokens, "meta_info": meta}


def _metrics(service: RolloutService) -> str:
    totals = service.worker.totals
    rows = (
        ("ctrl_rollout_requests_total", "counter", "Completions served.", totals.requests),
        ("ctrl_rollout_prompt_tokens_total", "counter", "Prompt tokens.", totals.prompt_tokens),
        ("ctrl_rollout_completion_tokens_total", "counter", "Completion tokens.", totals.completion_tokens),
        ("ctrl_rollout_busy_seconds_total", "counter", "Seconds spent decoding.", totals.busy_s),
        ("ctrl_rollout_weight_updates_total", "counter", "Weight updates.", totals.updates),
        ("ctrl_rollout_weight_version", "gauge", "Version of the weights.", service.worker.engine.version),
        ("ctrl_rollout_waiting", "gauge", "Requests that wait.", service.worker.waiting),
    )
    return "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in rows)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[str], None] | None = None,
    threads: int = 2,
    device: str = "cpu",
    dtype: str = "auto",
    batching: str = "auto",
    max_batch_tokens: int = 65536,
    token: str | None = None,
    own_user: bool = False,
) -> None:
    """Serve a Hugging Face folder until SIGTERM, SIGINT or SIGUSR2; ``on_ready`` gets the URL once it answers.

    Every route but ``/health`` and ``/metrics`` asks for a token, see :func:`http.access`. Raises ValueError for a
    missing model folder or a port in use.
    """
    import torch
    from transformers import AutoTokenizer

    from ctrl_hpc.rollout.engine import load_engine
    from ctrl_hpc.rollout.weights import weight_files

    weight_files(model)
    token, own_user = http_service.access(host, token, own_user)
    sock = http_service.listen(host, port)
    torch.set_num_threads(threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (ValueError, OSError) as error:  # of several lines
        sock.close()
        raise ValueError(f"{model}: no tokenizer that can be read: {' '.join(str(error).split())}") from None
    stop_ids = frozenset(() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))
    engine = load_engine(
        model,
        device=device,
        dtype=dtype,
        batching=batching,
        max_batch_tokens=max_batch_tokens,
        stop_ids=stop_ids,
    )
    worker = Worker(engine)
    try:
        serve_until_told(create_app(RolloutService(worker, tokenizer, model)), sock, on_ready, token, own_user)
    finally:
        worker.close()
        sock.close()


def serve_until_told(
    app: FastAPI,
    sock: socket.socket,
    on_ready: Callable[[str], None] | None,
    token: str | None,
    own_user: bool,
    lost: Callable[[], bool] | None = None,
) -> None:
    """Serve an application until a signal ends it, or ``lost`` says that there is nothing left to serve."""

    async def ready() -> None:
        if on_ready is not None:
            await asyncio.to_thread(on_ready, http_service.url(sock))

    async def watch(server: uvicorn.Server, lost: Callable[[], bool]) -> None:
        while not lost():
            await asyncio.sleep(1.0)
        server.should_exit = True

    app.router.on_startup.append(ready)
    gate = http_service.Gate(
        app,
        token=token,
        own_user=own_user,
        max_body_bytes=MAX_BODY_BYTES,
        open_paths=frozenset({"/health", "/metrics"}),
    )
    config = uvicorn.Config(
        gate, log_level="warning", access_log=False, http=http_service.Protocol, timeout_graceful_shutdown=5
    )
    server = http_service.DrainingServer(config)
    tasks: list[asyncio.Task[None]] = []
    if lost is not None:

        async def begin() -> None:
            tasks.append(asyncio.create_task(watch(server, lost)))

        app.router.on_startup.append(begin)
    server.run(sockets=[sock])
