"""The mirror: the driver tells wandb what the journals of a run say, as it comes. No other process knows of wandb.

Each journal is a wandb run of one group, each of its lines one row; a sweep's trial is a run that several journals are
told to. The journals are the truth, so that wandb's own files never have to be repaired:

* **A line is told once: when its step is greater than every step that was told.** A trainer that goes on from a
  checkpoint writes steps again that its run has already.
* **Offline** a mirror that ends has its rows on disk, and only then the journal's mark says so
  (:mod:`ctrl_hpc.tracking.marks`). What a killed driver or a killed wandb process (``wandb-core``, which writes up to
  32 KiB late) left is thrown away, and the journal told again, into a new piece, from where the mark stands: 100 rows
  take less than a second.
* **Online** the server says how many rows it has: as many lines were told.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil

from ctrl_hpc.config import Config
from ctrl_hpc.run import journal
from ctrl_hpc.tracking import record_file, server
from ctrl_hpc.tracking.marks import Mark, Source, adopt, run_id

LOOK_S = 1.0
"""Seconds between looks at the journals."""
PATIENCE_S = 60.0
"""Seconds until a wandb that could not start is tried again."""
_ATTEMPTS = 3
"""wandb's processes that may be lost in a row before that pause."""
_SPACE_WAITS_S = (1.0, 3.0, 10.0)
"""Between the tries to have the last rows on a disk that was full."""
RETRIES = 20
"""wandb waits 2 s, 4 s, 8 s ... and at most a minute between them: a quarter of an hour for a server that fails."""
_AGENT = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_NAME")
"""Variables by which a sweep's agent names the trial's run. They would name every run of this process."""


def losses() -> tuple[type[Exception], ...]:
    """What the library raises when its process is gone."""
    from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return (
        *(ConnectionError, HandleAbandonedError, MailboxClosedError),
        *(ServicePollForTokenError, WandbServiceConnectionError),
    )


class MirroredRun:
    """A wandb run, begun when there is something to tell it; ``begin`` calls ``wandb.init``."""

    def __init__(self, run_dir: Path, id: str, begin: Callable[[], Any], *, online: bool) -> None:
        self._run_dir, self._id, self._begin, self._online = run_dir, id, begin, online
        self._sources: dict[Path, Source] = {}
        self._run: Any = None
        self._rows = 0
        self.log: Path | None = None
        """wandb's own log of the newest piece."""
        self.missing: list[str] = []
        """Files of artifacts that are not there any more."""

    def follow(self, file: Path) -> None:
        """Tell the run this journal too."""
        if file not in self._sources:
            self._sources[file] = source = Source(file, self._id, self._online)
            if self._run is not None:
                self._join(source)

    @property
    def told(self) -> int:
        """The last step that was told; -1: none."""
        return max(source.told for source in self._sources.values())

    def look(self) -> int:
        """Tell what is due; returns how many lines that were."""
        if self._run is None and any(source.due() for source in self._sources.values()):
            self._start()
        count = 0
        for source in self._sources.values() if self._run is not None else ():
            for line in source.due():
                self._tell(source, line)
                source.done(line)
                count += 1
        return count

    def finish(self, exit_code: int) -> None:
        """Say that nothing more comes. What was told is on disk or sent once wandb's process has ended, too."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)

    def settle(self) -> list[str]:
        """After the end of wandb's process: mark what was told; what the server did not take, in words.

        Offline what the disk did not take is due again.
        """
        if self._run is None:
            return []
        if not self._online and (lost := self._lost()):
            self.forget()
            return [f"{lost} rows of {self._id} are not on disk; is {self._run_dir} full?"]
        refused = [*self.missing, *refused_by(self.log)] if self._online else []
        for source in self._sources.values():
            sent = {"sent": source.told} if self._online and not refused else {}
            source.set(told=source.mark.told if refused else source.told, open=None, **sent)
        self._run = None
        return refused

    def _lost(self) -> int:
        """How many rows that wandb was told are not in its file."""
        held = _steps_in(Path(self._run.dir).parent / f"run-{self._id}.wandb")
        told = {
            line["step"]
            for source in self._sources.values()
            for line in journal.lines(source.file)
            if source.certain < line["step"] <= source.told
        }
        return len(told - held)

    def forget(self) -> None:
        """wandb's process is gone: what it was told counts for nothing."""
        self._run = None
        for source in self._sources.values():
            source.again(source.certain)

    def _start(self) -> None:
        if not self._online:
            for name in {source.mark.open for source in self._sources.values()} - {None}:
                shutil.rmtree(self._run_dir / "wandb" / str(name), ignore_errors=True)
            while any((self._run_dir / "wandb").glob(f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{self._id}")):
                time.sleep(0.05)  # wandb names a folder by the second
        for source in self._sources.values():
            source.set()  # the journal is a mirror's before wandb makes a folder: killed between, nobody adopts that
        self._run = self._begin()
        run = self._run
        self._rows = server.rows(server_url(), run.entity, run.project, run.id) if self._online and run.resumed else 0
        self.log = Path(self._run.dir).parent / "logs" / "debug-internal.log"
        for source in self._sources.values():
            self._join(source)

    def _join(self, source: Source) -> None:
        """A journal enters a run that is open."""
        known = source.mark
        if not self._online:
            piece = Path(self._run.dir).parent.name
            source.set(open=piece, pieces=[*(name for name in known.pieces if name != known.open), piece])
            source.again(source.certain)
            return
        if known.sent < 0 and known.told >= 0 and self._run.resumed and self._sent_by_hand(known):
            source.set(sent=known.told)
        source.again(source.certain)
        if known.base is not None:
            has = _step_of(self._rows - known.base, known.after, journal.lines(source.file))
            for line in source.due():
                if line["step"] <= has:
                    self._tell_again(line)
            source.again(has)

    def _sent_by_hand(self, known: Mark) -> bool:
        folder = self._run_dir / "wandb"
        return bool(known.pieces) and all(list((folder / piece).glob("*.synced")) for piece in known.pieces)

    def _tell(self, source: Source, line: dict[str, Any]) -> None:
        step = line["step"]
        row = {**journal.numbers(line), **self._media(line), "step": step}
        if self._online and source.mark.base is None:
            source.set(base=self._rows, after=source.told)
        self._run.log(row)
        self._rows += 1
        self._tell_facts(line)

    def _tell_again(self, line: dict[str, Any]) -> None:
        """Of a row that the server has, what it may lack: files."""
        self._run.summary.update(self._media(line))
        self._tell_facts(line)

    def _media(self, line: dict[str, Any]) -> dict[str, Any]:
        import wandb

        out: dict[str, Any] = {}
        for name, path in (line.get("tables", {}) | line.get("images", {})).items():
            file = self._run_dir / path
            if not file.is_file():
                self.missing.append(f"{name}: {file}: no such file")
            elif file.suffix == ".json":
                out[name] = wandb.Table(**json.loads(file.read_bytes()), allow_mixed_types=True)
            else:
                out[name] = wandb.Image(str(file))
        return out

    def _tell_facts(self, line: dict[str, Any]) -> None:
        import wandb

        if line.get("summary"):
            self._run.summary.update(line["summary"])
        for item in line.get("artifacts", []):
            path = self._run_dir / item["path"]
            lost = [name for name in item["files"] if not (path / name if path.is_dir() else path).is_file()]
            self.missing += [f"a file of artifact {item['name']}: {path / name}: no such file" for name in lost]
            if not lost:
                artifact = wandb.Artifact(name=item["name"], type=item["type"])
                (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), policy="immutable")
                self._run.log_artifact(artifact)


def _step_of(rows: int, after: int, lines: Sequence[dict[str, Any]]) -> int:
    """The step of the last of so many rows, of lines after a step.

    There may be fewer lines: a trainer that goes on from a checkpoint writes its last steps again, one by one.
    """
    steps = [after, *(line["step"] for line in lines if line["step"] > after)]
    return steps[rows] if rows < len(steps) else steps[-1] + rows - len(steps) + 1


def _steps_in(file: Path) -> set[int]:
    """The ``step`` of every row that an offline record file holds; none where it is not there."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    found = set()
    for part in record_file.parts(file.read_bytes()) if file.is_file() else ():
        try:
            record = Record.FromString(part)
        except DecodeError:  # torn
            break
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if (item.key or ".".join(item.nested_key)) == "step":
                    found.add(int(json.loads(item.value_json)))
    return found


def refused_by(log: Path | None) -> list[str]:
    """What wandb's log of a piece says was given up, in words."""
    found: list[str] = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log and log.exists() else []:
        with suppress(ValueError):  # a panic's trace among the records
            row = json.loads(text)
            if str(row.get("level", "")).startswith("ERROR") and row["msg"] != "api: HTTP error":
                name = str(row.get("task", "")).partition(" Name: ")[2].partition(", Url:")[0]
                found.append(f"{name}: " * bool(name) + " ".join(f"{row['msg']} {row.get('error', '')}".split())[:300])
    return found


class Mirror:
    """The wandb runs of a run directory, each as far as its journal.

    Under a sweep's agent (``WANDB_RUN_ID``) the trial's run is told what the training stages and the report journal;
    the report has no run of its own then. ``only``: the one journal that is followed.
    """

    def __init__(
        self, config: Config, run_dir: Path, *, online: bool, only: str | None = None, place: Path | None = None
    ) -> None:
        """``place``: where wandb keeps its files in a folder ``wandb``, if not in the run directory."""
        self._config, self._run_dir, self._online, self._only = config, run_dir, online, only
        self._place = place or run_dir
        self._trial = {name: os.environ[name] for name in _AGENT if name in os.environ}
        self.runs: dict[str, MirroredRun] = {}

    def look(self) -> int:
        """Tell what is due to each run; returns how many lines that were."""
        for name, file in journal.journals(self._run_dir).items():
            for id in self._ids(name) if self._only in (None, name) else ():
                if id not in self.runs:
                    begin = self._beginner(id, name)
                    self.runs[id] = MirroredRun(self._run_dir, id, begin, online=self._online)
                self.runs[id].follow(file)
        return sum(run.look() for run in self.runs.values())

    def close(self, exit_code: int = 0) -> list[str]:
        """Tell the rest and end all runs; when this returns all is on disk, or sent but for what it says."""
        for wait_s in (*_SPACE_WAITS_S, None):
            self.look()
            for run in self.runs.values():
                run.finish(exit_code)
            _teardown()
            refused = [words for run in self.runs.values() for words in run.settle()]
            if self._online or not refused or wait_s is None:
                break
            time.sleep(wait_s)
        return refused

    def forget(self) -> None:
        """wandb's process is gone."""
        with suppress(*losses()):
            _teardown()
        for run in self.runs.values():
            run.forget()

    def _ids(self, name: str) -> list[str]:
        trial = self._trial.get("WANDB_RUN_ID")
        ids = [] if trial and name == "report" else [run_id(self._run_dir, name)]
        return [*ids, trial] if trial and name in (*journal.STAGES, "report") else ids

    def _beginner(self, id: str, name: str) -> Callable[[], Any]:
        trial = id == self._trial.get("WANDB_RUN_ID")
        return lambda: begin(self._config, self._place, id, name, self._online, self._trial if trial else None)


def begin(config: Config, place: Path, id: str, name: str, online: bool, trial: dict[str, str] | None) -> Any:
    """``wandb.init`` for a journal's run, or a trial's."""
    import wandb
    from omegaconf import OmegaConf

    of_trial = {} if trial is None else {
        "sweep_id": trial.get("WANDB_SWEEP_ID"), "sweep_param_path": trial.get("WANDB_SWEEP_PARAM_PATH")
    }  # fmt: skip
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_file_stream_retry_max=RETRIES,
        x_file_transfer_retry_max=RETRIES,
        x_graphql_retry_max=RETRIES,
        **{key: value for key, value in of_trial.items() if value},
    )
    run = wandb.init(
        dir=str(place),
        mode="online" if online else "offline",
        project=config.wandb.project,
        entity=config.wandb.entity,
        group=config.wandb.group or config.name,
        job_type=name.rstrip("-0123456789") if trial is None else "trial",
        name=f"{config.name}-{name}" if trial is None else None,
        id=id,
        resume="allow" if online else None,
        reinit="create_new",
        config=OmegaConf.to_container(OmegaConf.structured(config)),
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@contextmanager
def environment(place: Path) -> Iterator[None]:
    """wandb's environment while a mirror works: no agent's run, no words, and its data under ``place``/wandb/data.

    Tables wait there: not in the home of a node, which may not be there, nor be written to.
    """
    own = {"WANDB_DATA_DIR": str(place.absolute() / "wandb" / "data"), "WANDB_SILENT": "true"}
    before = {name: os.environ.pop(name, None) for name in (*_AGENT, *own)}
    os.environ |= own
    try:
        yield
    finally:
        for name in before:
            os.environ.pop(name, None)
        os.environ |= {name: value for name, value in before.items() if value is not None}


def _teardown() -> None:
    """``wandb.teardown()``, which exits with its process's exit code where that is not 0."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:
        raise ConnectionError(f"wandb's process ended with exit code {error.code}") from None


def kill_wandb() -> None:
    """End this process's wandb process, which may be waiting for a server."""
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            with suppress(psutil.NoSuchProcess):
                child.kill()


class LiveMirror:
    """A mirror that looks at the journals again and again while it is entered, in a thread.

    Nothing that befalls it ends the run: it is told, and `ctrl-hpc sync` sends what is missing, for the journals have
    it. Raises RuntimeError, in one line, where ``wandb.mode=online`` and the server is not to be reached.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._online = config, run_dir, config.wandb.mode == "online"
        self._closed, self._ended = threading.Event(), threading.Event()
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        for name, file in journal.journals(self._run_dir).items():
            adopt(self._run_dir, name, file)
        self._mirror = Mirror(self._config, self._run_dir, online=self._online)
        with ExitStack() as stack:
            stack.enter_context(environment(self._run_dir))  # before the library first reads it
            if self._online:
                try:
                    server.check(server_url())
                except RuntimeError as error:
                    raise RuntimeError(f"wandb: {error}; wandb.mode=offline needs no server") from None
            self._exit = stack.pop_all()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell the rest; on Ctrl-C what a server has not taken yet is left to the sync."""
        self._exit_code = 0 if kind is None else 1
        self._closed.set()
        with self._exit:
            try:
                self._ended.wait()
            except KeyboardInterrupt:
                kill_wandb()
                self._ended.wait()
                raise

    def told(self, id: str) -> int:
        """The last step that a wandb run was told; -1: none. It need not be on disk, or sent, yet."""
        return self._mirror.runs[id].told if id in self._mirror.runs else -1

    def _work(self) -> None:
        try:
            self._follow()
        finally:
            self._ended.set()

    def _follow(self) -> None:
        lost = 0
        while not self._closed.wait(LOOK_S):
            if self._tried(self._mirror.look):
                lost = 0
                continue
            lost += 1
            if lost % _ATTEMPTS == 0 and self._closed.wait(PATIENCE_S):
                break
        if not any(self._tried(self._end) for _ in range(_ATTEMPTS)):
            print("wandb: not all of the journals is there; ctrl-hpc sync sends it", flush=True)

    def _end(self) -> None:
        for words in self._mirror.close(self._exit_code):
            print(f"wandb: {words}; ctrl-hpc sync tries again", flush=True)

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether it could be done; what is in the way is told, and wandb's process begun anew."""
        import wandb

        try:
            work()
            return True
        except losses() as error:
            print(f"wandb: its process is lost ({line_of(error)}): starting another one", flush=True)
        except (wandb.Error, OSError, ValueError) as error:
            print(f"wandb: {line_of(error)}; tried again later", flush=True)
        self._mirror.forget()
        return False


def line_of(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def server_url() -> str:
    """Where wandb sends to: the environment's or the settings' server."""
    from wandb.sdk import wandb_setup  # wandb.setup() would start its service

    return str(wandb_setup.singleton().settings.base_url).rstrip("/")
