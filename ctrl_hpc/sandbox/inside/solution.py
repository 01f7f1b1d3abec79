"""The solution's side of a call: reads requests, calls the solution's functions, writes plain data back.

This side is untrusted, as the solution can replace anything in its process: the receiver believes nothing but data.
"""

from __future__ import annotations

import json
import traceback

import plain

REQUEST_FD, REPLY_FD = 3, 4


def serve(namespace: dict) -> None:
    """Answer requests, one JSON line each, until the other side closes."""
    with open(REQUEST_FD, "rb") as requests, open(REPLY_FD, "wb") as replies:
        for line in requests:
            replies.write(json.dumps(_answer(namespace, json.loads(line)), separators=(",", ":")).encode() + b"\n")
            replies.flush()


def _answer(namespace: dict, request: dict) -> dict:
    name = request["name"]
    found, value = _lookup(namespace, name)
    if not found:
        return {"missing": name}
    try:
        if "args" not in request:
            if isinstance(value, type):
                return {"unsupported": f"class {name} cannot cross"}
            return {"callable": True} if callable(value) else {"value": plain.encode(value)}
        arguments = [plain.decode(item) for item in request["args"]]
        keywords = {key: plain.decode(item) for key, item in request.get("kwargs", {}).items()}
        return {"value": plain.encode(value(*arguments, **keywords))}  # type: ignore[operator]
    except plain.Unsupported as error:
        return {"unsupported": str(error)}
    except Exception as error:  # noqa: BLE001 (the caller raises it again)
        return _raised(error)


def _raised(error: Exception) -> dict:
    """The exception as data; its traceback goes to stderr, from the solution's own frame on."""
    traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    messages = [item for item in error.args if isinstance(item, (str, int, float))]
    return {"raise": type(error).__name__, "args": [plain.encode(item) for item in messages]}


def _lookup(namespace: dict, name: str) -> tuple[bool, object]:
    """A global of the solution, or a method of its ``Solution`` class (the convention of function-style problems)."""
    if name in namespace:
        return True, namespace[name]
    solution_class = namespace.get("Solution")
    if isinstance(solution_class, type) and hasattr(solution_class, name):
        return True, getattr(solution_class(), name)
    return False, None
