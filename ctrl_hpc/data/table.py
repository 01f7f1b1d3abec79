"""Rows of a published data set, from the hub or local files; one-line errors that name file, row and field."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")
"""Files that can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row and where it came from."""

    where: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The value of a column; raises ValueError when the row lacks it."""
        if name not in self.values:
            raise ValueError(f"{self.where}: {name}: missing; the row has {', '.join(sorted(self.values))}")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a column that need not be there; ``default`` for None too."""
        value = self.values.get(name)
        return default if value is None else value

    def text(self, name: str) -> str:
        """A column that must be text."""
        value = self[name]
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name}: expected text, got {type(value).__name__}")
        return value

    def decoded(self, name: str) -> Any:
        """A column that holds JSON as text; what is not text is returned as it is."""
        value = self[name]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"{self.where}: {name}: not JSON: {error}") from None


def rows(path: str | None, *, hub: str, files: str | None = None, split: str) -> Iterator[Row]:
    """The rows of one split: of ``hub`` when ``path`` is None, else of a file or a folder of files.

    ``files`` names the files of a hub's data set that a program of its own would read, which is not run.

    Files may be JSON lines (also gzipped), a JSON list, parquet or arrow; in a folder with files named after several
    splits, those of the split are read.
    """
    if path is None:
        yield from _hub_rows(hub, files, split)
        return
    for file in _files(Path(path), split):
        number = 0
        for number, values in _file_rows(file):
            if not isinstance(values, dict):
                raise ValueError(f"{file}:{number}: expected an object, got {type(values).__name__}")
            yield Row(where=f"{file}:{number}", values=values)
        if number == 0:
            raise ValueError(f"{file}: holds no rows")


def require_split(name: str, split: str, *allowed: str) -> None:
    """Raise ValueError unless a data set has a split."""
    if split not in allowed:
        raise ValueError(f"data: {name} has no split {split!r}; allowed: {', '.join(allowed)}")


def _hub_rows(hub: str, files: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        if files is None:
            table = datasets.load_dataset(hub, split=split)
        else:
            kind = {"jsonl": "json"}.get(files.rpartition(".")[2], files.rpartition(".")[2])
            table = datasets.load_dataset(kind, data_files={split: f"hf://datasets/{hub}/{files}"}, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, *_client_errors()) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{hub}: cannot be loaded from the hub ({reason}); give local files with data.path") from None
    for number, values in enumerate(table):
        yield Row(where=f"{hub}[{number}]", values=dict(values))


def _client_errors() -> list[type[Exception]]:
    """What the hub's HTTP client raises without a network; which client that is depends on the hub's version."""
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]


def _files(place: Path, split: str) -> list[Path]:
    if place.is_file():
        if not place.name.endswith(ENDINGS):
            raise ValueError(f"{place}: cannot be read; allowed: {', '.join(ENDINGS)}")
        return [place]
    if not place.is_dir():
        raise ValueError(f"data.path: {place}: no such file or folder")
    found = sorted(file for file in place.rglob("*") if file.name.endswith(ENDINGS) and _is_data(file))
    own = [
        file for file in found if split in re.split(r"[-_.\d]+", file.name) or split in file.relative_to(place).parts
    ]
    if not found:
        raise ValueError(f"data.path: {place}: holds no file that ends in {', '.join(ENDINGS)}")
    return own or found


def _is_data(file: Path) -> bool:
    """Whether a file is not one of those that describe a saved data set."""
    return file.name not in ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")


def _file_rows(file: Path) -> Iterable[tuple[int, Any]]:
    """The rows with their numbers from 1; of JSON lines the lines' numbers."""
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(file)
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(content, list):
            raise ValueError(f"{file}: expected a list of rows, got {type(content).__name__}")
        return enumerate(content, start=1)
    return enumerate(_columns(file), start=1)


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: not JSON: {error}") from None


def _columns(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    yield from batch.to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:200]}") from None


_TOLERANT = re.compile(
    r"(?:absolute|relative)\s+(?:or\s+(?:absolute|relative)\s+)?(?:error|precision|difference)"
    r"|(?:error|precision|differs?|difference)[^.]{0,60}10\s*(?:\^|\*\*)?\s*\{?\s*[-−–]",
    re.IGNORECASE,
)


def comparison_of(statement: str) -> str | None:
    """``"float"`` when a problem's statement allows its numbers an error, else None: exact tokens."""
    return "float" if _TOLERANT.search(statement) else None
