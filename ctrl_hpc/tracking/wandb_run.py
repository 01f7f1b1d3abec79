"""A wandb run that outlives wandb's own process (``wandb-core``), which writes the records and may be killed.

That process keeps up to a block of records (32 KiB) in memory, and online what it has not sent yet. When it is lost
another one begins a new piece of the same run, as after a restart of the role, and is told what the old one had not
written to its file, or online what the server does not have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ctrl_hpc.cluster.processes import INTERRUPTED
from ctrl_hpc.tracking import wandb_file

type Saying = Callable[[Any], None]
"""Something told to a run of the wandb library, which is its argument."""

KEPT_ROWS = 512
"""Rows of history that are kept to be told again: more than a block holds, or than are logged between two sendings."""
ATTEMPTS = 3
"""wandb's processes that may be lost over one saying before the run goes on without."""


def _losses() -> tuple[type[Exception], ...]:
    """What the library raises when its process is gone."""
    from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    starting = (ServicePollForTokenError, WandbServiceConnectionError)
    return ConnectionError, HandleAbandonedError, MailboxClosedError, *starting


class WandbRun:
    """A run of the wandb library that is begun again under the same id as often as its process is lost.

    ``begin`` calls ``wandb.init``. Raises RuntimeError when wandb cannot start; where it cannot start again, that is
    printed, and what is told from then on is dropped.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._rows: deque[Saying] = deque(maxlen=KEPT_ROWS)
        self._n_rows = 0
        self._facts: dict[str, Saying] = {}
        self._pending: list[Saying] = []
        self._run: Any = self._start()
        self._begun_at = int(self._run.starting_step)

    def _start(self) -> Any:
        import wandb

        why = ""
        for _ in range(ATTEMPTS):
            try:
                return self._begin()
            except _losses() as error:
                _forget()
                why = _line(error)
            except wandb.Error as error:
                raise RuntimeError(f"wandb: {_line(error)}; wandb.mode=offline needs no server") from None
        raise RuntimeError(f"wandb: its process does not live: {why}")

    @property
    def file(self) -> Path | None:
        """The record file that is being written; None once nothing is logged any more."""
        return None if self._run is None else _file(self._run)

    def steps_sent(self) -> range | None:
        """Online: the values of ``step`` that the server has of earlier starts; None where it did not know the run."""
        found: list[range] = []

        def ask(run: Any) -> None:
            if run.resumed:
                found.append(range(int(run.summary.get("step", -1)) + 1))

        self._tell(ask)
        return found[0] if found else None

    def row(self, say: Saying) -> None:
        """Tell something that makes one row of the history."""
        self._rows.append(say)
        self._n_rows += 1
        self._tell(say)

    def fact(self, name: str, say: Saying) -> None:
        """Tell something that may be told twice (an artifact, a part of the summary); the last of a name counts."""
        self._facts[name] = say
        self._tell(say)

    def end(self, exit_code: int) -> None:
        """End the run; what was told is on disk (offline) or sent (online) when this returns."""

        def finish(run: Any) -> None:
            run.finish(exit_code=exit_code)
            _teardown()  # finish() returns before wandb's own process has written the last records

        self._tell(finish)
        self._run = None

    def _tell(self, say: Saying) -> None:
        for _ in range(ATTEMPTS):
            if self._run is None:
                return
            try:
                while self._pending:
                    self._pending[0](self._run)
                    del self._pending[0]
                say(self._run)
                return
            except _losses() as error:
                pending = say in self._rows or say in self._facts.values()
                self._begin_again(_line(error))
                if pending:  # or on disk
                    say = _nothing
        print("wandb: its process is lost again and again; no longer logged", flush=True)
        self._run = None

    def _begin_again(self, why: str) -> None:
        """A new piece of the run, and what it is to be told first: what was lost."""
        print(f"wandb: its process is lost ({why}): starting another one", flush=True)
        old = self._run
        _forget()
        try:
            self._run = self._start()
        except RuntimeError as error:
            print(f"{error}; no longer logged", flush=True)
            self._run = None
            return
        kept = len(wandb_file.rows(_file(old))) if old.offline else int(self._run.starting_step) - self._begun_at
        missing = self._n_rows - kept
        rows = list(self._rows)[-missing:] if missing > 0 else []
        self._pending = [*self._facts.values(), *rows]
        self._rows, self._n_rows = deque(rows, maxlen=KEPT_ROWS), len(rows)
        self._begun_at = int(self._run.starting_step)


def _file(run: Any) -> Path:
    """The record file of a run of the library."""
    return Path(run.dir).parent / f"run-{run.id}.wandb"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _nothing(_: Any) -> None:
    """Tell nothing more."""


def _forget() -> None:
    """Have the library forget a process that is gone."""
    with suppress(*_losses()):
        _teardown()


def _teardown() -> None:
    """``wandb.teardown()``, which exits with its process's exit code where that is not 0."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:
        if error.code == INTERRUPTED:  # a signal to this process, meanwhile
            raise
        raise ConnectionError(f"it ended with exit code {error.code}") from None
