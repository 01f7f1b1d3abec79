"""What every HTTP service of ours shares: a listening socket, an end without losing requests, a bearer token."""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ValueError when the port is in use or the host unknown."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only then: an answer would take 40 ms else.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(f"cannot listen on {host}:{port}: {reason}") from None
    return sock


def url(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn that answers what it has accepted and then returns, on SIGTERM, SIGINT and SIGUSR2; a second one hurries.

    Handlers are installed in the main thread only, and put back afterwards.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn around the serving loop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        before = {number: signal.signal(number, self._leave) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _leave(self, *_: object) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


class BodyTooLarge(ValueError):
    """A request's body is larger than the service takes."""


class Gate:
    """ASGI middleware: refuses requests without the bearer token (but for open paths) and bodies that are too large."""

    def __init__(
        self, app: ASGIApp, *, token: str | None, max_body_bytes: int, open_paths: frozenset[str] = frozenset()
    ) -> None:
        self._app, self._token, self._max, self._open = app, token, max_body_bytes, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in self._open:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token.encode()):
                await _refuse(send, 401, "a bearer token is needed")
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max:
            await _refuse(send, 413, f"the body is larger than {self._max} bytes")
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max:
                raise BodyTooLarge(f"the body is larger than {self._max} bytes")
            return message

        await self._app(scope, bounded, send)


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = b'{"detail":"%s"}' % detail.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
