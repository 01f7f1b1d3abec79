"""JSON to and from services over HTTP, and what their refusals and failures mean."""

from __future__ import annotations

import asyncio
import io
import json
import resource
from typing import Any

import aiohttp

_CONNECT_S = 5.0
"""Longest time to connect to a service."""
_BUSY, _FAULT, _TOO_LARGE, _LACKING = (429, 503), (408, 425), 413, 424
_LARGE_BYTES = 1 << 20


class Busy(Exception):
    """A service took no work. ``wait_s``: when it wants to be asked again; None where it said nothing of it."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class Lost(Exception):
    """A request went with its service: the connection broke, its time is over, or the service is gone or silent."""


class Fault(Lost):
    """A service answered with an internal error, or with what is no answer."""


class TooLarge(ValueError):
    """A service refuses a request for its size."""


class Lacking(ValueError):
    """A service lacks what a request only names: ``missing``."""

    def __init__(self, text: str, missing: list[str]) -> None:
        super().__init__(text)
        self.missing = missing


class JsonClient:
    """Connections to any number of services, for one event loop; kept for each address by itself."""

    def __init__(self, role: str, token: str | None = None) -> None:
        """``role`` names the services in messages; ``token`` is their bearer token."""
        self._role = role
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, path: str, content: str, timeout_s: float | None) -> Any:
        """The JSON that a service answers to a POST.

        Raises Busy, Lost or Fault where it does not answer, TooLarge or another ValueError where it refuses.
        """
        data = content.encode()
        body = io.BytesIO(data) if len(data) > _LARGE_BYTES else data
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._open().post(f"{url.rstrip('/')}{path}", data=body, headers=self._headers) as answer,
            ):
                text = await answer.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Busy(f"{url}: {error}") from None
        except aiohttp.InvalidURL:
            raise ValueError(f"{self._role}: {url} is not a URL") from None
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Lost(f"{url}: {str(error) or type(error).__name__}") from None
        if answer.status >= 300:
            raise _refusal(self._role, url + path, answer, text)
        try:
            return json.loads(text)
        except ValueError as error:
            raise Fault(f"{url}: the answer is not JSON: {error}") from None

    async def is_there(self, url: str, timeout_s: float) -> bool:
        """Whether a service answers on ``/health``, whatever it says."""
        try:
            async with asyncio.timeout(timeout_s), self._open().get(f"{url.rstrip('/')}/health", headers=self._headers):
                return True
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return False

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            allow_many_connections()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _refusal(role: str, address: str, answer: aiohttp.ClientResponse, body: bytes) -> Exception:
    """What an answer other than a good one means."""
    told = f"{address}: {answer.status} {_message(body)}"
    if answer.status in _BUSY:
        wait = answer.headers.get("retry-after", "")
        return Busy(told, float(wait) if wait.isdigit() else None)
    if answer.status in _FAULT or answer.status >= 500:
        return Fault(told)
    if answer.status == _LACKING and (missing := _missing(body)):
        return Lacking(told, missing)
    kind = TooLarge if answer.status == _TOO_LARGE else ValueError
    return kind(f"{role} {address} refuses: {answer.status} {_message(body)}")


def _missing(body: bytes) -> list[str]:
    try:
        return [str(name) for name in json.loads(body)["missing"]]
    except (ValueError, LookupError, TypeError):
        return []


def _message(body: bytes) -> str:
    """The message of an error's body, in any of the forms that servers use."""
    try:
        data = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:500]
    for key in ("error", "detail", "message"):
        data = data.get(key, data) if isinstance(data, dict) else data
    return str(data)[:500]


def allow_many_connections() -> None:
    """Let this process have as many sockets as the system allows: its soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
