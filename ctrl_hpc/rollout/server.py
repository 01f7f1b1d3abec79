"""The rollout server: SGLang's native routes and OpenAI's, over one model.

Native: ``/generate`` (token ids or text in; text, token ids and log-probs out; lists are batches),
``/update_weights_from_disk``, ``/abort_request``, ``/pause_generation`` and more (``ctrl_hpc.rollout.sglang_routes``).
OpenAI: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/models`` (``ctrl_hpc.rollout.openai_routes``).
Our own: ``/health``, ``/metrics``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse

from ctrl_hpc.rollout.openai_routes import add_openai_routes
from ctrl_hpc.rollout.sglang_routes import add_sglang_routes
from ctrl_hpc.rollout.worker import RolloutService, Worker
from ctrl_hpc.service import http as http_service


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

    @app.get("/health")
    async def health() -> Any:
        if not service.worker.alive:
            return JSONResponse({"status": "dead", "detail": "the model's thread has ended"}, status_code=503)
        return {"status": "ok", "weight_version": str(service.worker.engine.version), "waiting": service.worker.waiting}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_metrics(service))

    add_sglang_routes(app, service)
    add_openai_routes(app, service)
    return app


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
    from ctrl_hpc.rollout.weights import weight_files

    weight_files(model)
    token, own_user = http_service.access(host, token, own_user)
    sock = http_service.listen(host, port)
    try:
        worker, tokenizer = open_worker(
            model, device=device, threads=threads, dtype=dtype, batching=batching, max_batch_tokens=max_batch_tokens
        )
        try:
            http_service.serve_until_told(
                create_app(RolloutService(worker, tokenizer, model)), sock, on_ready, token, own_user
            )
        finally:
            worker.close()
    finally:
        sock.close()


def open_worker(
    model: str,
    *,
    device: str,
    threads: int,
    dtype: str,
    batching: str,
    max_batch_tokens: int,
    check: Callable[[Any], None] | None = None,
) -> tuple[Worker, Any]:
    """A worker over the model of a Hugging Face folder, and its tokenizer, which ``check`` sees before the model is
    loaded. Raises ValueError for a folder without a tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    from ctrl_hpc.rollout.engine import load_engine

    torch.set_num_threads(threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (ValueError, OSError) as error:  # of several lines
        raise ValueError(f"{model}: no tokenizer that can be read: {' '.join(str(error).split())}") from None
    if check is not None:
        check(tokenizer)
    stop_ids = frozenset(() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))
    engine = load_engine(
        model, device=device, dtype=dtype, batching=batching, max_batch_tokens=max_batch_tokens, stop_ids=stop_ids
    )
    return Worker(engine), tokenizer
