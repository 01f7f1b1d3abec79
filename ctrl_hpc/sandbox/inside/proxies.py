"""What stands for the solution's functions, classes and instances in the test's process.

Proxies pass plain data there and back. What would let the solution judge itself (its ``__eq__``, ``__bool__`` and the
like) is never asked for: it is unsupported. The first loss or unsupported value sticks, whatever the test catches.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections import deque
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
        self._exceptions: dict[str, type[Exception]] = {}

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
            sent = [_sent(item) for item in args]
            sent_by_name = {key: _sent(item) for key, item in kwargs.items()}
        except plain.Unsupported as error:
            self.unsupported(f"argument of {target['name']}: {error}")
        reply = self.ask({**target, "args": sent, "kwargs": sent_by_name})
        self._change({**{str(index): item for index, item in enumerate(args)}, **kwargs}, reply, target)
        return self.value(reply, target)

    def set(self, target: dict[str, Any], value: Any) -> None:
        """Set an attribute of an instance of the solution's."""
        try:
            sent = _sent(value)
        except plain.Unsupported as error:
            self.unsupported(f"attribute {target['name']}: {error}")
        self.value(self.ask({**target, "set": sent}), target)

    def _change(self, given: dict[str, Any], reply: dict[str, Any], target: dict[str, Any]) -> None:
        """Let the test's own arguments become what the solution made of them, as if it had been called here."""
        changed = reply.get("changed", {})
        try:
            for name, data in changed.items():
                if name in given:
                    _become(given[name], plain.decode(data))
        except (plain.Unsupported, ValueError, TypeError, KeyError, ArithmeticError, AttributeError, RecursionError):
            self.unsupported(f"an argument of {target['name']} was changed in a way that cannot cross")

    def value(self, reply: dict[str, Any], target: dict[str, Any]) -> Any:
        """What a reply stands for: plain data, or a proxy; raises what the solution raised."""
        raised: Exception | None = None
        try:
            if "value" in reply:
                return plain.decode(reply["value"])
            if reply.get("callable") is True:
                return _function(self, target)
            if reply.get("class") is True:
                return self._class(reply["bases"]) if "bases" in reply else Class(self, target)
            if (
                "module" in reply
                and reply["module"] == target.get("name")
                and reply["module"] in sys.stdlib_module_names
            ):
                return importlib.import_module(reply["module"])
            if type(reply.get("object")) is int:
                return Instance(self, reply["object"])
            if "raise" in reply:
                raised = self._exception(reply)
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

    def _class(self, bases: Any) -> type[Exception]:
        """What stands for an exception class of the solution's: one of the same name, with bases of the same names."""
        names = [str(name)[:100] for name in bases][:20]
        found: type[Exception] = Exception
        for index, name in enumerate(reversed(names)):
            builtin = getattr(builtins, name, None)
            if index == 0 and isinstance(builtin, type) and issubclass(builtin, Exception):
                found = builtin
            else:
                found = self._exceptions.setdefault(name, type(name, (found,), {}))
        return found

    def _exception(self, reply: dict[str, Any]) -> Exception:
        """The solution's exception: a built-in one by name, or one of its own classes, with plain arguments.

        Those that end an iteration become RuntimeError, as in generators (PEP 479): else they would end the test's.
        """
        found = self._class(reply.get("bases") or [reply["raise"]])
        if issubclass(found, (StopIteration, StopAsyncIteration)):
            found = type(found.__name__, (RuntimeError,), {})
        arguments = [plain.decode(item) for item in reply.get("args", [])]
        try:
            error = found(*arguments)
        except TypeError:
            error = type(found.__name__, (Exception,), {})(*arguments)
        error.from_solution = True  # type: ignore[attr-defined]
        return error

    def _lost(self) -> NoReturn:
        self.failure = SolutionLost("the solution's process ended before it answered")
        raise self.failure from None


def _sent(value: Any) -> object:
    """An argument as data: instances of the solution's classes by their numbers, also in lists and tuples."""
    if type(value) is Instance:
        return {"instance": vars(value)["_number"]}
    if type(value) is list:
        return [_sent(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_sent(item) for item in value]}
    return plain.encode(value)


def _become(old: Any, new: Any) -> Any:
    """Give a list, dictionary, set, deque or bytearray the contents of another, as far down as they are alike."""
    if type(old) is not type(new):
        return new
    if isinstance(old, (list, deque)):
        items = [_become(*pair) for pair in zip(old, new, strict=False)] + list(new)[len(old) :]
        old.clear()
        old.extend(items)
    elif isinstance(old, dict):
        items_of = {key: _become(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(items_of)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    else:
        return new
    return old


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
        vars(self).update(_channel=channel, _number=number)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.set({"object": self._number, "name": name}, value)

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
