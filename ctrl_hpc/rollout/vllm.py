"""A vLLM server behind the routes that our clients speak: token ids and log-probabilities, weights from a folder.

vLLM listens on a socket file in a folder of this user's, because its routes for new weights ask for no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI, HTTPException, Request

from ctrl_hpc.service import http

_SEEDS = 1 << 63
_SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")},
    "max_new_tokens": "max_tokens",
    "sampling_seed": "seed",
}
"""SGLang's names of sampling parameters, and vLLM's."""


class Vllm:
    """The server at a socket file. Requests wait while new weights are loaded, and these for requests in hand."""

    def __init__(self, place: Path, model: str) -> None:
        """``model``: the name under which it serves."""
        self._place, self._model = place, model
        self._version = 0
        self._in_hand = 0
        self._positions: int | None = None
        """Longest prompt and completion together, once it is known."""
        self._changed = asyncio.Condition()
        self._loading = False

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(str(self._place), limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession("http://vllm", connector=connector, timeout=timeout) as session:
            yield session

    async def healthy(self) -> bool:
        """Whether it answers on ``/health`` that it is well."""
        with contextlib.suppress(OSError, aiohttp.ClientError):
            async with self._asked() as session, session.get("/health") as answer:
                return answer.status == 200
        return False

    async def generate(self, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A completion each, as SGLang's ``/generate`` tells it. Raises HTTPException where vLLM refuses."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading)
            self._in_hand += 1
        try:
            async with self._asked() as session:
                if self._positions is None:
                    served = {entry["id"]: entry for entry in (await _get(session, "/v1/models"))["data"]}
                    self._positions = served.get(self._model, {}).get("max_model_len")
                tasks = [self._complete(session, *pair) for pair in zip(prompts, sampling, strict=True)]
                return await asyncio.gather(*tasks)
        finally:
            async with self._changed:
                self._in_hand -= 1
                self._changed.notify_all()

    async def _complete(
        self, session: aiohttp.ClientSession, prompt: list[int], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        unknown = sorted(set(sampling) - set(_SAMPLING))
        if unknown:
            raise HTTPException(400, f"sampling_params.{unknown[0]} is unknown; allowed: {', '.join(_SAMPLING)}")
        body: dict[str, Any] = {_SAMPLING[name]: value for name, value in sampling.items()}
        if "seed" in body:
            body["seed"] %= _SEEDS
        room = (self._positions or 0) - len(prompt)
        if room > 0:  # a longer prompt is refused by name
            body["max_tokens"] = min(body.get("max_tokens", room), room)
        body |= {"model": self._model, "prompt": prompt, "logprobs": 0, "return_token_ids": True}
        answer = await _post(session, "/v1/completions", body)
        (choice,) = answer["choices"]
        tokens = choice["token_ids"] or []  # none where it was aborted before it began
        logprobs = choice["logprobs"]["token_logprobs"] if tokens else []
        meta = {
            "finish_reason": {"type": choice["finish_reason"]},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "weight_version": str(self._version),
            "output_token_logprobs": [(logprob, token, None) for logprob, token in zip(logprobs, tokens, strict=True)],
        }
        return {"text": choice["text"], "output_ids": tokens, "meta_info": meta}

    async def load(self, folder: str, version: int) -> None:
        """New weights from a whole Hugging Face folder. Raises HTTPException where vLLM refuses them."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading)
            self._loading = True
            await self._changed.wait_for(lambda: self._in_hand == 0)
        try:
            async with self._asked() as session:
                await _post(
                    session, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                )
                await _post(session, "/reset_prefix_cache", None)
            self._version = version
        finally:
            async with self._changed:
                self._loading = False
                self._changed.notify_all()


async def _get(session: aiohttp.ClientSession, route: str) -> Any:
    return await _request(session, "GET", route, None)


async def _post(session: aiohttp.ClientSession, route: str, body: Any) -> Any:
    return await _request(session, "POST", route, body)


async def _request(session: aiohttp.ClientSession, method: str, route: str, body: Any) -> Any:
    try:
        async with session.request(method, route, json=body) as answer:
            text = await answer.text()
    except aiohttp.ClientError as error:
        raise HTTPException(500, f"vLLM does not answer: {error}") from None
    if answer.status >= 300:
        raise HTTPException(400 if answer.status < 500 else 500, f"vLLM {route}: {answer.status} {text[:500]}")
    return json.loads(text) if text else None


def create_app(engine: Vllm) -> FastAPI:
    """``/generate``, ``/update_weights_from_disk``, ``/health``."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not await engine.healthy():
            raise HTTPException(503, "vLLM is not well")
        return {"status": "ok"}

    @app.post("/generate")
    async def generate(request: Request) -> list[dict[str, Any]]:
        body = await request.json()
        try:
            prompts, sampling = body["input_ids"], body["sampling_params"]
            pairs = [(list(ids), dict(how)) for ids, how in zip(prompts, sampling, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"input_ids and sampling_params must be lists of one length: {error}") from None
        return await engine.generate([ids for ids, _ in pairs], [how for _, how in pairs])

    @app.post("/update_weights_from_disk")
    async def update(request: Request) -> dict[str, Any]:
        body = await request.json()
        version = str(body.get("weight_version", 0))
        if not version.isdigit() or not Path(str(body.get("model_path"))).is_dir():
            raise HTTPException(400, f"no folder {body.get('model_path')}, or no number: weight_version={version!r}")
        await engine.load(body["model_path"], int(version))
        return {"success": True, "message": "loaded"}

    return app


def serve(
    place: Path, model: str, *, host: str, on_ready: Callable[[str], None], token: str, lost: Callable[[], bool]
) -> None:
    """Serve the vLLM at a socket file until a signal ends this; ``on_ready`` gets the URL.

    Leaves, too, when ``lost`` says so, which is asked about once a second.
    """
    sock: socket.socket = http.listen(host, 0)
    try:
        http.serve_until_told(create_app(Vllm(place, model)), sock, on_ready, token, False, lost)
    finally:
        sock.close()
