"""The journals in TensorBoard and MLflow, beside wandb, by their own writers: ``tracking.writers``.

A journal is a run of each: TensorBoard's in ``RUN/tensorboard/JOURNAL``, MLflow's in an experiment of its server. A
line is told once, when its step is greater than every step that was told, as the wandb mirror does. TensorBoard's files
are written anew from the journals at every start; what an MLflow run was told stands in ``RUN/mlflow.json``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.run import journal

LOOK_S = 1.0
"""Seconds between looks at the journals."""
_CLOSE_S = 60.0
"""Longest wait for the last lines at the end of a run."""
_BATCH = 1000
"""Metrics that MLflow takes at once."""
_PARAMETERS = 100
"""Parameters that it takes at once; each has at most 6000 characters."""
_NAME = re.compile(r"[^\w\-./: ]")
"""What a metric's name in MLflow cannot hold."""
PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "mlflow": ("mlflow", "mlflow-skinny")}
"""What each writer imports, and the package that has it."""


def check(names: Sequence[str]) -> None:
    """Raises ValueError where a writer lacks its package."""
    for name in names:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"tracking.writers: {name} needs the package {package}; install it: pip install 'ctrl-hpc[{name}]'"
            )


class Writer(Protocol):
    """Takes a run's journals."""

    def told(self, name: str) -> int:
        """The last step of a journal that need not be told again; -1: none."""

    def tell(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take more lines of a journal."""

    def close(self, exit_code: int) -> None:
        """The run's process ends."""


class TensorBoard:
    """Event files by ``torch.utils.tensorboard``: numbers by wall time and step, pictures, tables as Markdown."""

    ROWS = 20
    """Of a table are shown."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "tensorboard"
        self._writers: dict[str, Any] = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def told(self, name: str) -> int:
        """Everything is written anew."""
        return -1

    def tell(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write, and flush: a killed driver leaves whole files."""
        from matplotlib.image import imread
        from torch.utils.tensorboard import SummaryWriter

        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self._folder / name))
        writer = self._writers[name]
        for line in lines:
            about = {"global_step": line["step"], "walltime": line["time"]}
            for key, value in journal.numbers(line).items():
                writer.add_scalar(key, value, **about)
            for key, path in line.get("images", {}).items():
                if (self._run_dir / path).is_file():
                    writer.add_image(key, imread(self._run_dir / path)[..., :3], dataformats="HWC", **about)
            for key, path in line.get("tables", {}).items():
                if (self._run_dir / path).is_file():
                    table = json.loads((self._run_dir / path).read_text(encoding="utf-8"))
                    writer.add_text(key, _markdown(table["columns"], table["data"][: self.ROWS]), **about)
        writer.flush()

    def close(self, exit_code: int) -> None:
        """End the files."""
        for writer in self._writers.values():
            writer.close()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(columns), ["---"] * len(columns), *cells])


class MLflow:
    """Runs of an MLflow server or store: numbers by time and step, the configuration as parameters, pictures kept."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._mark = config, run_dir, run_dir / "mlflow.json"
        own = str((run_dir / "mlflow").absolute())
        uri = config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file://{own}"
        with _quiet():
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_of(config.tracking.mlflow_experiment)
        known = json.loads(self._mark.read_text(encoding="utf-8")) if self._mark.is_file() else {}
        self._runs: dict[str, dict[str, Any]] = known.get(uri, {})
        self._others = {place: runs for place, runs in known.items() if place != uri}
        self._uri, self._open = uri, set[str]()

    def _experiment_of(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has made it just now
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def told(self, name: str) -> int:
        """As the mark says."""
        return int(self._runs[name]["told"]) if name in self._runs else -1

    def tell(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send, and mark what was taken."""
        from mlflow.entities import Metric

        with _quiet():
            run = self._begin(name)
            metrics = [
                Metric(_NAME.sub("_", key), float(value), int(1000 * line["time"]), line["step"])
                for line in lines
                for key, value in journal.numbers(line).items()
            ]
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(run, metrics=metrics[start : start + _BATCH])
            for path in [path for line in lines for path in line.get("images", {}).values()]:
                if (self._run_dir / path).is_file():
                    self._client.log_artifact(run, str(self._run_dir / path))
        self._runs[name]["told"] = lines[-1]["step"]
        self._remember()

    def _begin(self, name: str) -> str:
        if name not in self._runs:
            tags = {"ctrl_hpc.journal": name, "ctrl_hpc.group": self._config.wandb.group or self._config.name}
            made = self._client.create_run(self._experiment, run_name=f"{self._config.name}-{name}", tags=tags)
            self._runs[name] = {"run_id": made.info.run_id, "told": -1}
            self._remember()
            self._open.add(name)
            self._tell_configuration(made.info.run_id)
        elif name not in self._open:
            self._client.update_run(self._runs[name]["run_id"], status="RUNNING")
            self._open.add(name)
        return str(self._runs[name]["run_id"])

    def _tell_configuration(self, run: str) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flat(asdict(self._config))]
        for start in range(0, len(flat), _PARAMETERS):
            self._client.log_batch(run, params=flat[start : start + _PARAMETERS])

    def _remember(self) -> None:
        jsonl.write_text(self._mark, json.dumps(self._others | {self._uri: self._runs}, indent=1) + "\n")

    def close(self, exit_code: int) -> None:
        """Say how the runs ended."""
        with _quiet():
            for name in sorted(self._open):
                status = "FAILED" if exit_code else "FINISHED"
                self._client.set_terminated(self._runs[name]["run_id"], status=status)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = _NAME.sub("_", f"{above}{key}")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow with its store of files, which newer versions ask to be allowed, and without its telemetry."""
    own = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


WRITERS: dict[str, Callable[[Config, Path], Writer]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""By the names of ``tracking.writers``."""


class Teller:
    """Tells one writer what is new in the journals, each look; it raises whatever the writer does."""

    def __init__(self, writer: Writer, run_dir: Path) -> None:
        self._writer, self._run_dir = writer, run_dir
        self._tails: dict[str, journal.Tail] = {}
        self._due: dict[str, list[dict[str, Any]]] = {}
        self._told: dict[str, int] = {}

    def look(self) -> int:
        """Tell what is due; returns how many lines that were."""
        count = 0
        for name, file in journal.journals(self._run_dir).items():
            tail = self._tails.setdefault(name, journal.Tail(file))
            told = self._told.setdefault(name, self._writer.told(name))
            lines = self._due[name] = [
                line for line in (*self._due.get(name, ()), *tail.new()) if line["step"] > told
            ]  # they stay due until they are told
            if lines:
                self._writer.tell(name, lines)
                self._told[name], self._due[name] = lines[-1]["step"], []
                count += len(lines)
        return count


class LiveWriters:
    """The writers of ``tracking.writers`` while a run works, in a thread.

    Nothing that befalls one ends the run: it is said, and `ctrl-hpc track RUN` tells what is missing.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._closed = threading.Event()
        self._exit_code = 0
        self._threads = [
            threading.Thread(target=self._follow, args=(name,), name=name, daemon=True)
            for name in dict.fromkeys(config.tracking.writers)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell the rest, for at most a minute."""
        self._exit_code = 0 if kind is None else 1
        self._closed.set()
        for thread in self._threads:
            thread.join(_CLOSE_S)
            if thread.is_alive():
                self._say(thread.name, "does not answer")

    def _follow(self, name: str) -> None:
        said = ""
        writer: Writer | None = None
        teller: Teller | None = None
        while True:
            last = self._closed.wait(LOOK_S)
            try:
                writer = writer or WRITERS[name](self._config, self._run_dir)
                teller = teller or Teller(writer, self._run_dir)
                teller.look()
                if last:
                    writer.close(self._exit_code)
            except Exception as error:  # noqa: BLE001 - whatever befalls a tracker, the run goes on
                words = " ".join(str(error).split())[:300] or type(error).__name__
                if words != said or last:
                    self._say(name, words)
                said = words
            if last:
                return

    def _say(self, name: str, words: str) -> None:
        print(f"{name}: {words}; ctrl-hpc track {self._run_dir} {name} tells it what it lacks", flush=True)


def track(config: Config, run_dir: Path, name: str) -> int:
    """Tell a writer what it lacks of a run; returns how many lines that were.

    Raises ValueError where its package is missing, or there are no journals; RuntimeError, in one line, where it fails.
    """
    check([name])
    if not journal.journals(run_dir):
        raise ValueError(f"{run_dir}: no journals of a run there")
    try:
        writer = WRITERS[name](config, run_dir)
        count = Teller(writer, run_dir).look()
        writer.close(0)
    except Exception as error:  # a library's own kinds of error, all told in one line
        raise RuntimeError(f"{name}: {' '.join(str(error).split())[:300]}") from error
    return count
