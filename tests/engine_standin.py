"""Stands in for ``vllm serve`` and ``python -m sglang.launch_server``: the real command line, the real routes.

It decodes nothing: token i of a completion is the seed, or 7, plus i, plus the version that its weights' folder names
(a file ``version``). It refuses arguments and fields that the real ones do not have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

TOKENS = 3
POSITIONS = 1000
"""Longest prompt and completion together."""


class Engine:
    """What both have in common."""

    def __init__(self, model: str, tensor: int) -> None:
        assert (Path(model) / "config.json").is_file() and tensor >= 1
        self.version = self.read(model)

    def read(self, folder: str) -> int:
        """The weights of a folder."""
        file = Path(folder) / "version"
        return int(file.read_text()) if file.exists() else 0

    def tokens(self, seed: int | None) -> list[int]:
        """A completion."""
        return [(7 if seed is None else seed % 1000) + at + self.version for at in range(TOKENS)]


def sglang(arguments: list[str]) -> None:
    """The native routes."""
    parser = argparse.ArgumentParser()
    for name, kind in (("config", str), ("model-path", str), ("host", str), ("port", int), ("dtype", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--tensor-parallel-size", type=int, required=True)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--sampling-defaults", choices=["openai"], required=True)
    options = parser.parse_args(arguments)
    assert Path(options.config).stat().st_mode & 0o077 == 0, "the token is nobody else's to read"
    key = json.loads(Path(options.config).read_text())["api-key"]
    engine = Engine(options.model_path, options.tensor_parallel_size)

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        assert set(body) == {"input_ids", "sampling_params", "return_logprob"}, body
        out = []
        for _, sampling in zip(body["input_ids"], body["sampling_params"], strict=True):
            assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (-1, 0.0, 1.0)
            tokens = engine.tokens(sampling.get("sampling_seed"))
            meta = {
                "finish_reason": {"type": "stop", "matched": tokens[-1]},
                "weight_version": str(engine.version),
                "output_token_logprobs": [(-0.5, token, None) for token in tokens],
            }
            out.append({"text": " ".join(map(str, tokens)), "output_ids": tokens, "meta_info": meta})
        return web.json_response(out)

    async def update(request: web.Request) -> web.Response:
        body = await request.json()
        engine.version = engine.read(body["model_path"])
        assert body["weight_version"] == str(engine.version)
        return web.json_response({"success": True, "message": "", "num_paused_requests": 0})

    routes = [web.post("/generate", generate), web.post("/update_weights_from_disk", update)]
    web.run_app(application(routes, key), host=options.host, port=options.port, print=None)


def vllm(arguments: list[str]) -> None:
    """OpenAI's completions with token ids, and the routes of its development mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    for name in ("uds", "served-model-name", "dtype", "logprobs-mode"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--tensor-parallel-size", type=int, required=True)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--generation-config", choices=["vllm"], required=True)
    options = parser.parse_args(arguments)
    engine = Engine(options.model, options.tensor_parallel_size)

    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        allowed = {"model", "prompt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
        allowed |= {"seed", "logprobs", "return_token_ids"}
        assert set(body) <= allowed and body["return_token_ids"] and body["logprobs"] == 0, body
        assert body["model"] == options.served_model_name and -(2**63) <= body.get("seed", 0) < 2**63
        if len(body["prompt"]) + body["max_tokens"] > POSITIONS:
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)
        tokens = engine.tokens(body.get("seed"))
        choice = {"index": 0, "text": " ".join(map(str, tokens)), "finish_reason": "length", "token_ids": tokens}
        choice["logprobs"] = {"token_logprobs": [-0.5] * TOKENS, "tokens": list(map(str, tokens))}
        return web.json_response({"object": "text_completion", "choices": [choice]})

    async def rpc(request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == "reload_weights"
        engine.version = engine.read(body["kwargs"]["weights_path"])
        return web.json_response({"results": [None] * options.tensor_parallel_size})

    async def reset(_: web.Request) -> web.Response:
        return web.Response()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": options.served_model_name, "max_model_len": POSITIONS}]})

    routes = [web.post("/v1/completions", completions), web.get("/v1/models", models)]
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        routes += [web.post("/collective_rpc", rpc), web.post("/reset_prefix_cache", reset)]
    web.run_app(application(routes, None), path=options.uds, print=None)


def application(routes: list[Any], key: str | None) -> web.Application:
    """With ``/health``, which alone asks for no key."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> Any:
        given = request.headers.get("authorization")
        if key is not None and request.path != "/health" and given != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(middlewares=[check], client_max_size=1 << 30)
    app.add_routes([*routes, web.get("/health", health)])
    return app


if __name__ == "__main__":
    {"sglang": sglang, "vllm": vllm}[sys.argv[1]](sys.argv[2:])
