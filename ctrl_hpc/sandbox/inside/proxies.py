"""What stands for the solution's functions, classes and instances in the test's process.

Proxies pass plain data there and back. What would let the solution judge itself (its ``__eq__``, ``__bool__`` and the
like) is never asked for: it is unsupported. The first loss or unsupported value sticks, whatever the test catches.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

import plain

_REPLY_FD, _REQUEST_FD = 3, 4
_MAX_REPLY_BYTES = 32 << 20


class SolutionLost(BaseException):
    """The solution's process ended, or sent something that is no answer."""


class UnsupportedValue(BaseException):
    """A value cannot cross; not an Exception, so that no ``except Exception`` of a test takes it for an answer."""


class Channel:
    """Requests to the solution, one at a time."""

    def __init__(self) -> None:
        self._replies = os.fdopen(_REPLY_FD, "rb")
        self._requests = os.fdopen(_REQUEST_FD, "wb")
        self.failure: SolutionLost | UnsupportedValue | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The solution's reply to a request."""
        if self.failure is not None:
            raise self.failure
        try:
            self._requests.write(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            self._requests.flush()
            line = self._replies.readline(_MAX_REPLY_BYTES)
            reply = json.loads(line)
        except (OSError, ValueError, RecursionError):
            self._lost()
        if not line.endswith(b"\n") or not isinstance(reply, dict):
            self._lost()
        return reply

    def call(self, target: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What calling a target of the solution's gives, or raises."""
        try:
            sent = [plain.encode(item) for item in args]
            sent_by_name = {key: plain.encode(item) for key, item in kwargs.items()}
        except plain.Unsupported as error:
            self.unsupported(f"argument of {target['name']}: {error}")
        return self.value(self.ask({**target, "args": sent, "kwargs": sent_by_name}), target)

    def value(self, reply: dict[str, Any], target: dict[str, Any]) -> Any:
        """What a reply stands for: plain data, or a proxy; raises what the solution raised."""
        raised: Exception | None = None
        try:
            if "value" in reply:
                return plain.decode(reply["value"])
            if reply.get("callable") is True:
                return _function(self, target)
            if reply.get("class") is True:
                return Class(self, target)
            if type(reply.get("object")) is int:
                return Instance(self, reply["object"])
            if "raise" in reply:
                raised = _exception(reply)
            reason = str(reply.get("unsupported", "malformed reply"))
        except (plain.Unsupported, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            reason = str(error)
        if raised is not None:
            raise raised
        self.unsupported(reason)

    def unsupported(self, reason: str) -> NoReturn:
        """Give up on the test: something cannot cross."""
        self.failure = UnsupportedValue(reason)
        raise self.failure from None

    def _lost(self) -> NoReturn:
        self.failure = SolutionLost("the solution's process ended before it answered")
        raise self.failure from None


def _exception(reply: dict[str, Any]) -> Exception:
    """The solution's exception: a built-in one by name, with plain arguments, or a new class of that name."""
    name = str(reply["raise"])[:100]
    arguments = [plain.decode(item) for item in reply.get("args", [])]
    found = getattr(builtins, name, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        found = type(name, (Exception,), {})
    try:
        error = found(*arguments)
    except TypeError:
        error = type(name, (Exception,), {})(*arguments)
    error.from_solution = True  # type: ignore[attr-defined]
    return error


def _function(channel: Channel, target: dict[str, Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return channel.call(target, args, kwargs)

    call.__name__ = call.__qualname__ = target["name"]
    return call


def _unsupported(name: str) -> Callable[..., Any]:
    def special(self: Any, *_: Any) -> Any:
        channel = object.__getattribute__(self, "_channel")
        return channel.unsupported(f"{name} of an object of the solution's cannot cross")

    return special


_SPECIAL = """eq ne lt le gt ge hash bool iter next contains reversed index int float complex abs neg add radd sub rsub
mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow and or xor invert call enter exit setitem delitem format
instancecheck subclasscheck""".split()


class Class:
    """A class of the solution's: can be called; nothing can be tested for being of it."""

    def __init__(self, channel: Channel, target: dict[str, Any]) -> None:
        self._channel, self._target = channel, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.call(self._target, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        self._channel.unsupported(f"{self._target['name']}.{name} of the solution's class cannot cross")


class Instance:
    """An instance of a class of the solution's: its attributes and methods, its length, its items, its texts."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self._number = channel, number

    def __getattr__(self, name: str) -> Any:
        target = {"object": self._number, "name": name}
        reply = self._channel.ask(target)
        if "missing" in reply:
            raise AttributeError(name)
        return self._channel.value(reply, target)

    def _method(self, name: str, *args: Any) -> Any:
        return self._channel.call({"object": self._number, "name": name}, args, {})

    def __len__(self) -> Any:
        return self._method("__len__")

    def __getitem__(self, key: Any) -> Any:
        return self._method("__getitem__", key)

    def __str__(self) -> Any:
        return self._method("__str__")

    def __repr__(self) -> Any:
        return self._method("__repr__")


for _name in _SPECIAL:
    for _proxy in (Class, Instance):
        if f"__{_name}__" not in vars(_proxy):
            setattr(_proxy, f"__{_name}__", _unsupported(_name))
