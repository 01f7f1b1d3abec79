"""What is asked of a wandb server without the library: whether it answers and takes the key, and how much it has."""

from __future__ import annotations

import base64
import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

_CHECK_S = 20.0
"""Longest wait for an answer."""


def check(url: str) -> None:
    """Raises RuntimeError when the server cannot be reached, answers with an error, or does not take the key."""
    if not _ask(url, "query Viewer { viewer { id } }", {}).get("viewer"):
        raise RuntimeError(f"{url} does not know the key; run `wandb login --relogin`")


def rows(url: str, entity: str | None, project: str, id: str) -> int:
    """How many rows of a run's history the server has. Raises RuntimeError as :func:`check` does."""
    query = (
        "query Lines($project: String, $entity: String, $name: String!) { model(name: $project, entityName: $entity) "
        "{ bucket(name: $name, missingOk: true) { historyLineCount } } }"
    )
    model = _ask(url, query, {"project": project, "entity": entity, "name": id}).get("model") or {}
    return int((model.get("bucket") or {}).get("historyLineCount") or 0)


def _ask(url: str, query: str, given: Mapping[str, str | None]) -> dict[str, Any]:
    key = os.environ.get("WANDB_API_KEY") or _netrc_key(url)
    if not key:
        raise RuntimeError(f"no key for {url}; run `wandb login`, or set WANDB_API_KEY")
    body = json.dumps({"query": query, "variables": given}).encode()
    sign = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"authorization": f"Basic {sign}", "content-type": "application/json"}
    try:
        with urlopen(Request(f"{url}/graphql", data=body, headers=headers), timeout=_CHECK_S) as answer:
            return json.load(answer).get("data") or {}
    except HTTPError as error:
        refused = "does not take the key" if error.code in (401, 403) else "has a fault; try again later"
        raise RuntimeError(f"{url} {refused} (HTTP {error.code})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"{url} cannot be reached: {reason}") from None


def _netrc_key(url: str) -> str | None:
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(file).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        raise RuntimeError(f"{file}: {error}") from None
    return known[2] if known else None
