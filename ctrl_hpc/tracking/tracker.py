"""Tracking with Weights & Biases: one run a role, grouped by experiment; offline beside the run unless told otherwise.

Nothing here needs a network: ``ctrl-hpc sync`` (or ``wandb sync RUN_DIR/wandb/offline-run-*``) uploads later.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ctrl_hpc.config import Config
from ctrl_hpc.tracking import wandb_file
from ctrl_hpc.tracking.wandb_run import WandbRun

OWN_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME", "WANDB_SERVICE")
"""Variables that belong to one process (a sweep's agent sets them): children that inherited them would all write the
same run."""


MEASURED = ("sft", "rl", "executor", "critic", "generator")
"""Roles whose machines are measured too: CPU, memory, GPUs."""


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for jobs and child processes: without what names this process's own wandb run."""
    return {name: value for name, value in environment.items() if name not in OWN_VARIABLES}


class Tracker:
    """The wandb run of one role (driver, sft, rl, rollout, executor ...) of an experiment.

    ``element`` is its number in an array. The run's id is the run directory's, the role's and the element's own, so
    that a process that starts again continues it (online in place; offline beside, to be appended in order by the
    sync); it does the same when wandb's own process is killed. Under a sweep's agent the run is the one that the agent
    named: the trial. With ``wandb.mode=disabled`` every method does nothing. Raises RuntimeError with one line when
    wandb cannot start.
    """

    def __init__(self, config: Config, run_dir: Path, role: str, element: int | None = None) -> None:
        self._run: WandbRun | None = None
        self._tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        if config.wandb.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        self._data_dir = os.environ.get("WANDB_DATA_DIR")
        # tables wait there for the sync: not in the home of a node, which others may not see, nor the node write to
        os.environ["WANDB_DATA_DIR"] = str(run_dir.absolute() / "wandb" / "data")
        self._run_dir, self._online = run_dir, config.wandb.mode == "online"
        self._run = WandbRun(lambda: _begin(config, run_dir, role, element))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def logged(self) -> range | set[int] | None:
        """The steps that earlier starts of this role logged; to be asked before this one logs.

        None where there was no earlier start, or nothing tells of it: files that were sent may have been removed.
        """
        if self._run is None:
            return None
        if self._online:
            return self._run.steps_sent()
        own = self._run.file
        if own is None:
            return None
        id = own.stem.removeprefix("run-")
        earlier = [file for file in wandb_file.of_run(self._run_dir, id) if file.parent.name != own.parent.name]
        return {step for file in earlier for step in wandb_file.rows(file) if step is not None} if earlier else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step; ``step`` is an axis of its own, so that a continued run stays monotonous."""
        if self._run is not None:
            row = {**metrics, "step": step}
            self._run.row(lambda run: run.log(row))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows for people to read: samples, critiques, verdicts."""
        if self._run is not None:
            import wandb

            self._tables[name] = list(columns), [list(row) for row in rows]

            def say(run: Any) -> None:  # the newest, should it be said again
                names, data = self._tables[name]
                run.log({name: wandb.Table(columns=names, data=data, allow_mixed_types=True)})

            self._run.row(say)

    def image(self, path: Path) -> None:
        """A picture file, under its name without the ending."""
        if self._run is not None:
            import wandb

            self._run.row(lambda run: run.log({path.stem: wandb.Image(str(path))}))

    def artifact(self, path: Path, kind: str, name: str) -> None:
        """A file, or a folder's files, kept with the run; nothing is copied: a sync sends what lies there then."""
        if self._run is not None:
            import wandb

            def say(run: Any) -> None:
                artifact = wandb.Artifact(name=name, type=kind)
                if path.is_dir():
                    artifact.add_dir(str(path), policy="immutable")
                else:
                    artifact.add_file(str(path), policy="immutable")
                run.log_artifact(artifact)

            self._run.fact(f"artifact {name} {path}", say)

    def summary(self, values: Mapping[str, float | str]) -> None:
        """The run's final numbers, those that a sweep compares among them."""
        if self._run is not None:
            self._run.fact(f"summary of {sorted(values)}", lambda run: run.summary.update(dict(values)))

    def close(self, exit_code: int = 0) -> None:
        """End the run; what was logged is on disk (offline) or sent (online) when this returns."""
        if self._run is not None:
            run, self._run = self._run, None
            run.end(exit_code)
            if self._data_dir is None:
                os.environ.pop("WANDB_DATA_DIR", None)
            else:
                os.environ["WANDB_DATA_DIR"] = self._data_dir


def _begin(config: Config, run_dir: Path, role: str, element: int | None) -> Any:
    """``wandb.init`` for a role."""
    import wandb  # a second of start-up that --help need not pay

    options = config.wandb
    trial = os.environ.get("WANDB_RUN_ID")
    id = trial or run_id(run_dir, role, element)
    _await_free_folder(run_dir, id)
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=role not in MEASURED,
        x_stats_sampling_interval=15.0,
        x_save_requirements=False,
    )
    run = wandb.init(
        dir=str(run_dir),
        mode=options.mode,
        project=options.project,
        entity=options.entity,
        group=options.group or config.name,
        job_type=role if trial is None else "trial",
        name=None if trial else f"{config.name}-{role}" + ("" if element is None else f"-{element}"),
        id=id,
        resume="allow" if options.mode == "online" else None,
        config=_plain(config),
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def run_id(run_dir: Path, role: str, element: int | None = None) -> str:
    """The wandb id of a role: the same for every start of it in this run directory, and no other run's.

    What they have in common is drawn once, into ``RUN_DIR/wandb_id``.
    """
    file = run_dir / "wandb_id"
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        mine = run_dir / f".wandb_id.{secrets.token_hex(4)}"
        mine.write_text(secrets.token_hex(4), encoding="ascii")
        with suppress(FileExistsError):  # another process of the run was faster
            os.link(mine, file)
        mine.unlink()
    words = (file.read_text(encoding="ascii"), role, *(() if element is None else (str(element),)))
    return "-".join(words)


def _await_free_folder(run_dir: Path, id: str) -> None:
    """wandb names an offline folder by the second: a role that starts twice within one would overwrite its first."""
    while (run_dir / "wandb" / f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-{id}").exists():
        time.sleep(0.05)


def _plain(config: Config) -> dict[str, Any]:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
