"""What stops a service, or slows it for others: texts that take long to read, threads that have ended."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from ctrl_hpc.cluster import element
from ctrl_hpc.records import Execution, Limits, StdinTest
from ctrl_hpc.sandbox import Sandbox, fusion
from ctrl_hpc.sandbox.client import ExecutorClient
from ctrl_hpc.sandbox.memory import Watch, Watchdog
from ctrl_hpc.sandbox.server import create_app
from ctrl_hpc.service import http


def test_fences_are_found_as_by_the_quadratic_expression() -> None:
    dice, fenced = random.Random(0), re.compile(fusion.FENCED, re.DOTALL)
    parts = ["```", "`", "\n", "\n\n", " ", "\t", "\r\n", "a", "py", "\x1c", "\u2028"]
    for _ in range(20_000):
        text = "".join(dice.choice(parts) for _ in range(dice.randint(0, 24)))
        assert fusion._fenced(text) == fenced.findall(text), text


LONG = ["```\n" + "\n" * 1_000_000, "`" * 1_000_000, "```\n" * 100_000, "```\na" + " " * 1_000_000, "```x" * 100_000]


@pytest.mark.parametrize("text", [*LONG, "def f():\n" * 100_000, "\n" * 1_000_000], ids=lambda text: repr(text[:8]))
def test_long_texts_without_an_answer_are_read_at_once(text: str) -> None:
    """Each takes an hour where the time is quadratic."""
    assert len(fusion.extract(text)) <= len(text)


@pytest.fixture
def ended() -> Iterator[Sandbox]:
    """A sandbox whose only worker has ended."""
    with Sandbox(workers=1) as sandbox:
        assert sandbox.alive
        sandbox._queue.put(None)
        sandbox._threads[0].join()
        yield sandbox


def test_a_service_whose_worker_has_ended_is_not_healthy(ended: Sandbox) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(ended)), base_url="http://x") as client:
            return await client.get("/health")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["status"]) == (503, "dead")


def test_an_element_whose_worker_has_ended_leaves(ended: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = http.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(ended), log_config=None, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    asked_to_leave: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked_to_leave.append(number))
    try:
        assert element.answers(http.url(sock))
    finally:
        signal.signal(signal.SIGTERM, before)
        server.should_exit = True
        thread.join()
        sock.close()
    assert asked_to_leave == [signal.SIGTERM]


@pytest.mark.slow
def test_a_request_over_the_size_limit_costs_its_own_program_alone() -> None:
    """A real service that takes 64 KiB: the rest of the batch is judged, and it answers on."""
    tests = (StdinTest(stdin="", expected_stdout="1\n"),)
    programs = ["print(1)", "print(2)", f"print(1)  # {'x' * (1 << 16)}", "print(1)"]
    sock = http.listen("127.0.0.1", 0)
    with Sandbox(workers=1) as sandbox:
        app = create_app(sandbox, max_body_bytes=1 << 16)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            with ExecutorClient(lambda: [http.url(sock)]) as executor:
                verdicts = executor.run_many(
                    [Execution(program=text, tests=tests, limits=Limits()) for text in programs]
                )
            chunked = httpx.post(f"{http.url(sock)}/run_tests", content=iter([b"x" * (1 << 15)] * 3))
            health = httpx.get(f"{http.url(sock)}/health")
        finally:
            server.should_exit = True
            thread.join()
            sock.close()
    assert [verdict.status for verdict in verdicts] == ["accepted", "wrong_answer", "sandbox_error", "accepted"]
    assert "larger than 65536 bytes" in verdicts[2].detail
    assert (chunked.status_code, health.status_code) == (413, 200)


def test_the_watchdog_watches_on_whatever_one_watch_raises() -> None:
    seen = threading.Event()

    def odd() -> bool:
        raise ValueError("not a number")

    dog = Watchdog()
    dog.add(Watch(odd, lambda: None))
    dog.add(Watch(lambda: True, seen.set))
    assert seen.wait(10)
    time.sleep(0.1)
    assert dog.alive
    dog.close()
