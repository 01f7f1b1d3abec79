"""The solution's side of a call: reads requests, calls the solution's functions, writes plain data back.

This side is untrusted, as the solution can replace anything in its process: the receiver believes nothing but data.

Requests: ``{"name"}`` asks what a global is, with ``"args"`` and ``"kwargs"`` calls it; ``"object"`` beside them means
an attribute of an instance made before, ``"method"`` one of the class ``Solution`` where there is such a method.
Replies: one of ``value``, ``callable``, ``class``, ``object`` (the number of what cannot cross and stays here, and
why), ``missing``, ``raise``, ``unsupported``.
"""

from __future__ import annotations

import json
import traceback
from typing import Any

import plain

_REQUEST_FD, _REPLY_FD = 3, 4


def serve(namespace: dict[str, Any], given: dict[str, Any]) -> None:
    """Answer requests, one JSON line each, until the other side closes.

    ``given`` is what the namespace held before the program ran: a name that still means the same is not the solution's.
    """
    instances: list[Any] = []
    own = {name: value for name, value in namespace.items() if name not in given or given[name] is not value}
    with open(_REQUEST_FD, "rb") as requests, open(_REPLY_FD, "wb") as replies:
        for line in requests:
            reply = _answer(own, instances, json.loads(line))
            replies.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
            replies.flush()


def _answer(namespace: dict[str, Any], instances: list[Any], request: dict[str, Any]) -> dict[str, Any]:
    try:
        found, value = _lookup(namespace, instances, request)
        if not found:
            return {"missing": request["name"]}
        if "args" not in request:
            if isinstance(value, type):
                return {"class": True}
            return {"callable": True} if callable(value) else {"value": plain.encode(value)}
        arguments = [plain.decode(item) for item in request["args"]]
        keywords = {key: plain.decode(item) for key, item in request.get("kwargs", {}).items()}
        result = value(*arguments, **keywords)
        try:
            return {"value": plain.encode(result)}
        except plain.Unsupported as error:
            instances.append(result)
            return {"object": len(instances) - 1, "unsupported": str(error)}
    except plain.Unsupported as error:
        return {"unsupported": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (the caller raises it again)
        return _raised(error)


def _raised(error: Exception) -> dict[str, Any]:
    """The exception as data; its traceback goes to stderr, from the solution's own frame on."""
    traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    messages = [item for item in error.args if isinstance(item, (str, int, float))]
    return {"raise": type(error).__name__, "args": [plain.encode(item) for item in messages]}


def _lookup(namespace: dict[str, Any], instances: list[Any], request: dict[str, Any]) -> tuple[bool, Any]:
    """A global of the solution, or a method of its ``Solution`` class (the convention of function-style problems).

    Where the problem asks for a method, the class comes first: a helper may have the method's name.
    """
    name = request["name"]
    if "object" in request:
        instance = instances[request["object"]]
        return hasattr(instance, name), getattr(instance, name, None)
    solution_class: Any = namespace.get("Solution")
    has_method = isinstance(solution_class, type) and hasattr(solution_class, name)
    if name in namespace and not (has_method and request.get("method")):
        return True, namespace[name]
    if has_method:
        return True, getattr(solution_class(), name)
    return False, None
