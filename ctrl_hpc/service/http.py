"""What every HTTP service of ours shares: a listening socket, an end without losing requests, and who may ask.

Others on a node reach its loopback, too: a service always asks for a bearer token. One that was started by hand on
loopback takes requests of its own user's processes without it, so that clients which know no token work as they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import os
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ctrl_hpc.service.access import is_ours, user_of_connection
from ctrl_hpc.service.json_client import allow_many_connections


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ValueError when the port is in use or the host unknown."""
    allow_many_connections()
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


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; another process may take it before it is used: be ready to try again."""
    with listen(host, 0) as sock:
        return int(sock.getsockname()[1])


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


FIRST_S = 20.0
"""How long a client may take to send a request's headers."""
MOST_IDLE, _YOUNG_S = 256, 1.0
"""Connections without a request that are kept; of more the oldest goes, unless it is as young as this."""


class Protocol(H11Protocol):
    """HTTP/1.1 whose connections do not wait for ever for a request, so that idle and slow ones keep nobody out."""

    _waiting: ClassVar[WeakKeyDictionary[ServerState, dict[Protocol, asyncio.TimerHandle]]] = WeakKeyDictionary()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the client its time."""
        super().connection_made(transport)
        waiting = self._await_request()
        oldest, timer = next(iter(waiting.items()))
        if len(waiting) > MOST_IDLE and self.loop.time() > timer.when() - FIRST_S + _YOUNG_S:
            oldest._give_up()

    def data_received(self, data: bytes) -> None:
        """Look whether a request has come."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self not in self._waiting[self.server_state]:
            self._await_request()

    def on_response_complete(self) -> None:
        """Give a next request its time from here on, of which a part came with the last one."""
        super().on_response_complete()
        begun, _ = self.conn.trailing_data
        if begun and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_request(self) -> dict[Protocol, asyncio.TimerHandle]:
        waiting = self._waiting.setdefault(self.server_state, {})
        waiting[self] = self.loop.call_later(FIRST_S, self._give_up)
        return waiting

    def _stop_waiting(self) -> None:
        timer = self._waiting[self.server_state].pop(self, None)
        if timer is not None:
            timer.cancel()

    def _give_up(self) -> None:
        self._stop_waiting()
        self.transport.close()


class BodyTooLarge(ValueError):
    """A request's body is larger than the service takes."""


def _is_loopback(host: str) -> bool:
    """Whether only this machine's processes reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def access(host: str, token: str | None, own_user: bool = False) -> tuple[str, bool]:
    """The token that a service asks for, and whether its own user's processes need none.

    Without a token only those are served. Raises ValueError where other machines could ask then.
    """
    if token:
        return token, own_user
    if not _is_loopback(host):
        raise ValueError(f"--host {host}: other machines may ask, so a token is needed (--token-env NAME)")
    return secrets.token_urlsafe(32), True


def token_in(file: Path) -> str:
    """The token in a file, made where there is none, or an empty one; readable by its owner only.

    Raises ValueError when the file is another user's.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = _read_token(file)
    if found:
        return found
    part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as out:
            out.write(secrets.token_urlsafe(32))
        if found is None:
            with contextlib.suppress(FileExistsError):  # another process was first: its token counts
                os.link(part, file)
        else:
            os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return _read_token(file) or ""


def _read_token(file: Path) -> str | None:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, encoding="ascii") as text:
        info = os.fstat(fd)
        if not is_ours(info) or not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{file}: is not this user's file; remove it, or choose another run_dir")
        return text.read().strip()


def _of_own_user(scope: Scope) -> bool:
    """Whether a connection over loopback comes from a process of this service's user, and not from a web page."""
    client, server = scope.get("client"), scope.get("server")
    if (
        not client
        or not server
        or not _is_loopback(client[0])
        or any(name == b"origin" for name, _ in scope["headers"])
    ):
        return False
    return user_of_connection(client, server) == os.geteuid()


def _token_of(header: bytes) -> bytes:
    """The token of an Authorization header; as a password, too, which clients take from URLs."""
    kind, _, given = header.partition(b" ")
    if kind.lower() == b"bearer":
        return given
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2] if kind.lower() == b"basic" else b""
    except binascii.Error:
        return b""


_BODY_S = 60.0
"""Longest silence within a request's body."""


class Gate:
    """ASGI middleware: refuses requests without the token (but for open paths) and bodies too large or too slow.

    With ``own_user`` processes of the service's own user need no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        max_body_bytes: int,
        open_paths: frozenset[str] = frozenset(),
        own_user: bool = False,
    ) -> None:
        self._app, self._token, self._max, self._open = app, token, max_body_bytes, open_paths
        self._own_user = own_user

    def _may_ask(self, scope: Scope, header: bytes | None) -> bool:
        if self._token is None or scope["path"] in self._open:
            return True
        if header is not None:
            return hmac.compare_digest(_token_of(header), self._token.encode())
        return self._own_user and _of_own_user(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._may_ask(scope, headers.get(b"authorization")):
            await _refuse(send, 401, "a bearer token is needed")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max:
            await _refuse(send, 413, f"the body is larger than {self._max} bytes")
            return
        read, whole = 0, False

        async def bounded() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout(None if whole else _BODY_S):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            whole = not message.get("more_body", False)
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


_MAX_BODY_BYTES = 1 << 28
"""Largest request."""


def settings(app: Any, *, drain_s: int) -> uvicorn.Config:
    """How services are served: warnings alone are logged, and the process's logging stays as it is.

    uvicorn's own log configuration closes every handler there is, absl's together with the stream behind it.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        http=Protocol,
        timeout_graceful_shutdown=drain_s,
    )


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
            await asyncio.to_thread(on_ready, url(sock))

    async def watch(server: uvicorn.Server, lost: Callable[[], bool]) -> None:
        while not lost():
            await asyncio.sleep(1.0)
        server.should_exit = True

    app.router.on_startup.append(ready)
    gate = Gate(
        app,
        token=token,
        own_user=own_user,
        max_body_bytes=_MAX_BODY_BYTES,
        open_paths=frozenset({"/health", "/metrics"}),
    )
    server = DrainingServer(settings(gate, drain_s=5))
    tasks: list[asyncio.Task[None]] = []
    if lost is not None:

        async def begin() -> None:
            tasks.append(asyncio.create_task(watch(server, lost)))

        app.router.on_startup.append(begin)
    server.run(sockets=[sock])
