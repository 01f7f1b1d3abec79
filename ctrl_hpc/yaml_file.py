"""YAML files of users: suites and sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read(path: Path, what: str) -> Any:
    """What a file holds; raises ValueError with one line where there is no such ``what``, or it is not YAML."""
    if not path.is_file():
        raise ValueError(f"{path}: no such {what}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
