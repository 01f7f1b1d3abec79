"""``ctrl_hpc.launch``: the same run from Python.

import ctrl_hpc
run = ctrl_hpc.launch("configs/tiny.yaml", "rl.steps=50")
run.wait()
run.results()["datasets"]["tiny"]["critics"]["rl"]["pass_at_1"]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_hpc.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRun:
    """A run whose driver works in the background."""

    folder: Path
    """The run directory."""
    driver: subprocess.Popen[bytes]
    """The driver's process."""

    @property
    def log(self) -> Path:
        """What the driver prints."""
        return self.folder / "logs" / "driver.log"

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The run's services and trainer jobs: role, state, host, job id and process id."""
        from ctrl_hpc.cluster.status import jobs

        return jobs(self.folder)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the run has finished.

        Raises RuntimeError with the end of the driver's log when it failed, TimeoutError when it is still running.
        """
        try:
            code = self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.folder}: still running after {timeout_s} s; its log: {self.log}") from None
        if code != 0:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
            raise RuntimeError(f"{self.folder}: the run ended with exit code {code}: {last[0]} (log: {self.log})")

    def results(self) -> dict[str, Any]:
        """The content of ``report/results.json``; waits for the run first."""
        self.wait()
        results: dict[str, Any] = json.loads((self.folder / "report" / "results.json").read_text())
        return results

    def stop(self, grace_s: float = 30.0) -> None:
        """End the run and everything it started; a later launch continues where it stopped."""
        if self.driver.poll() is None:
            self.driver.terminate()  # not SIGINT, which a driver launched from a background job may ignore at first
            try:
                self.driver.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.driver.kill()
                self.driver.wait()


def launch(config: Config | str | Path, *overrides: str) -> LaunchedRun:
    """Start a run in the background and return at once.

    ``config`` is a configuration, or the path of a YAML file with ``a.b=c`` overrides. Raises ValueError, before
    anything starts, when the configuration is wrong or the run's folder belongs to another one.
    """
    from ctrl_hpc import config as configuration
    from ctrl_hpc import jsonl, preflight
    from ctrl_hpc.run import snapshot
    from ctrl_hpc.service import access

    if isinstance(config, (str, Path)):
        config = configuration.load(config, overrides)
    elif overrides:
        raise ValueError("overrides go with the path of a YAML file, not with a configuration that is already built")
    folder = preflight.check(config)
    access.make_private(folder)
    asked = snapshot.folder_of(folder) / snapshot.ASKED
    jsonl.write_text(asked, configuration.dump(config))
    log = folder / "logs" / "driver.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as out:
        driver = subprocess.Popen(
            [sys.executable, "-m", "ctrl_hpc.cli", "run", str(asked)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return LaunchedRun(folder=folder, driver=driver)
