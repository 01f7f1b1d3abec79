"""A rollout server in a thread of the test's process, on a free loopback port."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import uvicorn
from transformers import AutoTokenizer

from ctrl_hpc.rollout.decoding import Engine
from ctrl_hpc.rollout.engine import load_engine
from ctrl_hpc.rollout.server import RolloutService, create_app
from ctrl_hpc.rollout.worker import Worker
from ctrl_hpc.service.http import listen


@contextlib.contextmanager
def running(folder: str, engine: Engine | None = None) -> Iterator[str]:
    """The URL of a server that answers."""
    worker = Worker(engine or load_engine(folder, device="cpu"))
    app = create_app(RolloutService(worker, AutoTokenizer.from_pretrained(folder), folder))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))
    ready = threading.Event()
    app.router.on_startup.append(ready.set)
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        worker.close()
        sock.close()
