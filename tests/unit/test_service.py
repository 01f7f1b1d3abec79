"""The listening socket that all services share."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from ctrl_hpc.service import http


def test_answers_are_not_held_back() -> None:
    """asyncio turns Nagle's algorithm off on what the socket accepts."""

    async def no_delay() -> int:
        sock = http.listen("127.0.0.1", 0)
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            accepted.set_result(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            found = await accepted
            writer.close()
            await writer.wait_closed()
        return found

    assert asyncio.run(no_delay()) != 0


def test_a_port_in_use_and_an_unknown_host_are_one_clear_line() -> None:
    with http.listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert http.url(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            http.listen("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1:99999"):
        http.listen("127.0.0.1", 99999)


def test_a_service_leaves_the_handlers_of_its_process_alone(tmp_path: Path) -> None:
    """uvicorn's own settings close them all, and absl's handler closes the stream it writes to."""
    handler = logging.FileHandler(tmp_path / "own.log")
    log = logging.getLogger("own")
    log.addHandler(handler)
    try:
        settings = http.settings(lambda: None, drain_s=1)
        log.warning("still here")
        assert handler.stream is not None and not handler.stream.closed
        assert settings.log_config is None and logging.getLogger("uvicorn.error").level == logging.WARNING
    finally:
        log.removeHandler(handler)
        handler.close()
    assert (tmp_path / "own.log").read_text() == "still here\n"
