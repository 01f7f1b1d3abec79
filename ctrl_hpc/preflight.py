"""One check before anything starts, the same for ``run``, ``--dry-run``, ``sbatch``, suites, sweeps and from Python.

Nothing that can be known at the start fails after an hour. What is wrong anywhere (a name, a key, a template, a data
file's rows) is told apart from what this machine lacks (a model's folder, a GPU, a Slurm), which a dry run only notes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc import config as configuration
from ctrl_hpc.config import Config
from ctrl_hpc.config.facts import is_url
from ctrl_hpc.config.load import close_to
from ctrl_hpc.config.machine import resolve_device
from ctrl_hpc.config.stages import STAGES
from ctrl_hpc.data import catalog, critic_benchmarks
from ctrl_hpc.evaluate.critics import check_oracles, critics, roles
from ctrl_hpc.flow.prompts import Prompts, closings, judgements
from ctrl_hpc.records import Problem
from ctrl_hpc.rollout.choices import check_close
from ctrl_hpc.rollout.thinking import Thinking
from ctrl_hpc.run import directory
from ctrl_hpc.sandbox.judge import COMPARISONS
from ctrl_hpc.tracking import writers

PATIENCE_S = 10.0
"""Longest wait for the answer of an endpoint."""
_SLURM_SECTIONS = {"executor": "executor", "critic": "rollout", "generator": "rollout", "trainer": "trainer"}
"""The section of ``launch`` that each role's resources stand in."""
_REFUSALS = (
    ("partition", "launch.{section}.partition"),
    ("account", "launch.account"),
    ("qos", "launch.qos"),
    ("feature", "launch.{section}.constraint"),
    ("time limit", "launch.{section}.time_min"),
    ("gres", "launch.{section}.gpus"),
    ("memory", "launch.{section}.memory_gb"),
    ("", "launch.{section}"),
)
"""The key that a word of sbatch's refusal means."""
_LATER = ("not available now", "busy", "drained", "down")
"""Words of a refusal that is none: the job would wait."""
_OF_WEIGHTS = 4
"""Training writes at least so many times the folder of the weights: a checkpoint holds them in fp32 with Adam's two
moments, beside the trained critic's own folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that would end the run."""

    text: str
    """One line: the key, the value, and what is allowed."""
    here: bool = False
    """Whether it is this machine that lacks something; the configuration may be right elsewhere."""


def check(config: Config, stages: Iterable[str] | None = None) -> Path:
    """The run's folder, when nothing is in the way of these stages (None: ``config.stages``); writes nothing.

    Raises ValueError, in one line, for the first thing that is.
    """
    for finding in findings(config, stages):
        raise ValueError(finding.text)
    return Path(config.run_dir or "")


def findings(config: Config, stages: Iterable[str] | None = None) -> Iterator[Finding]:
    """What is in the way of those of the stages (None: ``config.stages``) that are not done yet."""
    configuration.check(config)
    folder = directory.check(config)
    wanted = config.stages if stages is None else tuple(stages)
    todo = [name for name in STAGES if name in wanted and not directory.is_done(folder, name)]
    if not todo:
        return
    for part in (_of_records, _of_data, _of_critic_benchmarks, _of_critics, _of_prompts):
        yield from _told(part, config, folder, todo)
    for part in (_of_prompt_folder, _of_models, _of_texts, _of_devices, _of_disk, _of_writers):
        yield from _told(part, config, folder, todo, here=True)
    if config.launch.snapshot == "keep":  # a later start of a job: what failed meanwhile may come back
        return
    yield from _of_endpoints(config, todo)
    yield from _of_slurm(config, todo) if config.launch.engine == "slurm" else _of_ports(config)


Part = Callable[[Config, Path, Sequence[str]], None]


def _told(part: Part, config: Config, folder: Path, todo: Sequence[str], here: bool = False) -> Iterator[Finding]:
    try:
        part(config, folder, todo)
    except ValueError as error:
        yield Finding(text=str(error), here=here)


def _of_records(config: Config, folder: Path, todo: Sequence[str]) -> None:
    for name in todo:
        for before in STAGES[name].after:
            if before not in todo and not directory.is_done(folder, before):
                raise ValueError(
                    f"{name}: needs the records of {before}; run `ctrl-hpc {before}` with the same arguments first"
                )


def _of_critics(config: Config, folder: Path, todo: Sequence[str]) -> None:
    critics(config)
    if "eval" not in todo:
        return
    check_oracles(config, catalog.ORACLES)
    for critic in ("sft", "rl"):
        if critic in config.eval.critics and critic not in todo and not directory.is_done(folder, critic):
            raise ValueError(f"eval.critics: {critic} has not been trained in {folder}; run `ctrl-hpc {critic}` first")


def _of_prompts(config: Config, folder: Path, todo: Sequence[str]) -> None:
    if not _is_absent(config.prompts.folder):
        Prompts.load(config.prompts.folder, config.prompts.system)


def _of_prompt_folder(config: Config, folder: Path, todo: Sequence[str]) -> None:
    place = config.prompts.folder
    if _is_absent(place):
        told = os.path.relpath(place) if Path(place).is_relative_to(Path.cwd()) else place
        raise ValueError(
            f"prompts.folder: {place} is no folder; critic-rl's wording is read into it by "
            f"`ctrl-hpc prompts import CHECKOUT {told}`"
        )


def _is_absent(place: str) -> bool:
    """Whether a path, unlike the name of packaged templates, leads nowhere."""
    return Path(place).is_absolute() and not Path(place).exists()


def _of_data(config: Config, folder: Path, todo: Sequence[str]) -> None:
    """Names and places; problems in our own schema are read through, as nothing else tells whether they can be."""
    data = config.data
    training = {"sample", "synthesize", "sft", "rl"} & set(todo)
    asked = [("data.name", "data.path", data.name, data.path, data.split)] if training else []
    for name in data.eval_names:
        asked.append(("data.eval_names", "data.eval_path", name, catalog.eval_path(data, name), data.eval_split))
    for name, own in data.benchmarks.items():
        asked.append(("data.benchmarks", f"data.benchmarks.{name}", name, own or None, data.eval_split))
    for key, place_key, name, place, split in asked:
        if name not in catalog.DATASETS:
            near = close_to(name, list(catalog.DATASETS))
            raise ValueError(f"{key}: {name!r} is not a data set{near}; allowed: {', '.join(catalog.DATASETS)}")
        if place and not Path(place).exists():
            raise ValueError(f"{place_key}: {place}: no such file or folder")
        if name == "jsonl" and place is None:
            raise ValueError(f"{place_key}: missing; the data set jsonl is a file of problems")
        if name == "jsonl":
            _of_comparisons(config, place, catalog.read(name, place, split).items)


def _of_critic_benchmarks(config: Config, folder: Path, todo: Sequence[str]) -> None:
    """Names and places; one's own answers are read through."""
    asked = config.eval.critic_benchmarks
    for source, path in asked.sources.items() if "eval" in todo else ():
        name, _ = asked.parts(source)
        try:
            critic_benchmarks.check(name, path or None)
            if path and not Path(path).exists():
                raise ValueError(f"{path}: no such file or folder")
            if name == "own":
                critic_benchmarks.load(name, path)
        except ValueError as error:
            raise ValueError(f"eval.critic_benchmarks.sources: {error}") from None


def _of_comparisons(config: Config, place: str | None, problems: Iterable[Problem]) -> None:
    known = [*COMPARISONS, *config.executor.judges]
    for problem in problems:
        name = (problem.comparison or "exact").partition(":")[0]
        if name not in known:
            raise ValueError(
                f"{place}: {problem.id}: comparison: {name!r} is not one of {', '.join(known)}{close_to(name, known)}; "
                "executor.judges adds more"
            )


def _of_models(config: Config, folder: Path, todo: Sequence[str]) -> None:
    needed = roles(config, todo)
    places = {}
    if "generator" in needed:
        places["generator"] = config.generator
    if "critic" in needed or {"sft", "rl"} & set(todo):
        places["critic.model"] = config.critic.model
    if config.tiny.rebuild:  # makes both
        places = {}
    if "eval" in todo:
        named = {name: place for name, place in config.eval.models.items() if name in config.eval.critics}
        places |= {f"eval.models.{name}": place for name, place in named.items() if not is_url(place)}
    missing = {place: key for key, place in reversed(places.items()) if not (Path(place) / "config.json").is_file()}
    if missing:
        raise ValueError(
            "; ".join(
                f"{key}: {place} is not a Hugging Face model folder (it holds no config.json){_hub(place)}"
                for place, key in reversed(missing.items())
            )
        )


def _of_texts(config: Config, folder: Path, todo: Sequence[str]) -> None:
    """Whether the models' chat templates can do what ``critic.thinking`` and ``generator_thinking`` ask, and whether
    ``prompts.critique_close`` leaves room for a judgement in the critic's tokens."""
    asked = {
        "critic": ("critic.thinking", config.critic.thinking, config.critic.model),
        "generator": ("generator_thinking", config.generator_thinking, config.generator),
    }
    for role in sorted(roles(config, todo) & set(asked)):
        key, mode, place = asked[role]
        made_first = role == "critic" and config.tiny.rebuild  # by the run: one that thinks, where asked for
        words = config.prompts.critique_close if role == "critic" else ""
        if (mode != "auto" or words) and not made_first and (Path(place) / "config.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(place)
            if mode != "auto":
                Thinking(mode=mode).check(tokenizer, key)
            if words:
                check_close(tokenizer, closings(words), judgements(words), "prompts.critique_close")


def _hub(place: str) -> str:
    """How to fetch what looks like a name of the hub, which loading has made a path from the working directory."""
    inside = Path(place).relative_to(Path.cwd()).as_posix() if Path(place).is_relative_to(Path.cwd()) else ""
    if inside.count("/") != 1 or Path(inside).parent.exists():
        return ""
    return f"; from the hub: hf download {inside} --local-dir {inside}"


def _of_devices(config: Config, folder: Path, todo: Sequence[str]) -> None:
    if config.launch.engine != "local":
        return
    if {"sft", "rl"} & set(todo) and config.trainer.device == "cuda":
        resolve_device("trainer.device", "cuda")
    if {"critic", "generator"} & roles(config, todo) and config.rollout.device == "cuda":
        resolve_device("rollout.device", "cuda")


def _of_writers(config: Config, folder: Path, todo: Sequence[str]) -> None:
    writers.check(config.tracking.writers)


def _of_disk(config: Config, folder: Path, todo: Sequence[str]) -> None:
    place = folder
    while not place.exists():
        place = place.parent
    # /proc and /sys, where a root user may write and nothing can be kept, are file systems without a size
    if not os.access(place, os.W_OK) or shutil.disk_usage(place).total == 0:
        raise ValueError(f"run_dir: {folder}: {place} is not writable; choose another run_dir (run_dir=PATH)")
    if (folder / "config.yaml").exists() or not {"sft", "rl"} & set(todo):
        return
    weights = sum(file.stat().st_size for file in Path(config.critic.model).glob("*.safetensors"))
    free = shutil.disk_usage(place).free
    if free < _OF_WEIGHTS * weights:
        raise ValueError(
            f"run_dir: {folder}: {free / 1e9:.1f} GB are free; training {config.critic.model} writes at least "
            f"{_OF_WEIGHTS * weights / 1e9:.1f} GB; choose another run_dir (run_dir=PATH)"
        )


def _of_endpoints(config: Config, todo: Sequence[str]) -> Iterator[Finding]:
    asked = {}
    generates = any("generator" in STAGES[name].services for name in todo)
    if config.generator_is_url and generates:
        asked["generator"] = (config.generator, "models", config.endpoint.key_env)
    rollout = config.rollout
    if "critic" in roles(config, todo):
        if rollout.critic_urls and rollout.critic_key_env and not os.environ.get(rollout.critic_key_env):
            text = f"rollout.critic_key_env: the environment variable {rollout.critic_key_env} is not set"
            yield Finding(text=text, here=True)
        asked |= {f"rollout.critic_urls: {url}": (url, "health", "") for url in rollout.critic_urls}
    if "mlflow" in config.tracking.writers and is_url(config.tracking.mlflow_uri or ""):
        asked["tracking.mlflow_uri"] = (config.tracking.mlflow_uri or "", "health", "")
    for key, (url, route, key_env) in asked.items():
        told = _unreachable(url, route, key_env)
        if told:
            yield Finding(text=f"{key}: {told}", here=True)


def _unreachable(url: str, route: str, key_env: str) -> str:
    """Why an endpoint cannot be asked; empty where it answers (that it is overloaded is an answer)."""
    import httpx

    key = os.environ.get(key_env) if key_env else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/{route}", headers=headers, timeout=PATIENCE_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        return f"{url} does not answer: {str(error) or type(error).__name__}"
    if answer.status_code in (401, 403) and key_env:
        return f"{url} refuses the key (HTTP {answer.status_code}); it is read from ${key_env} (endpoint.key_env)"
    return ""


def _of_ports(config: Config) -> Iterator[Finding]:
    try:
        with socket.socket() as server:
            server.bind((config.launch.bind, 0))
    except OSError as error:
        yield Finding(text=f"launch.bind: {config.launch.bind}: no service can listen there: {error}", here=True)


def _of_slurm(config: Config, todo: Sequence[str]) -> Iterator[Finding]:
    """What Slurm says to each role's batch script, which it is shown but not given."""
    from ctrl_hpc.cluster.jobs import scripts

    if shutil.which("sbatch") is None:
        yield Finding(
            text="launch.engine: slurm needs the commands sbatch, squeue and scancel, which are not here", here=True
        )
        return
    needed = roles(config, todo) | ({"trainer"} if {"sft", "rl"} & set(todo) else set())
    for role, text in scripts(config).items():
        if role not in needed:
            continue
        try:
            shown = subprocess.run(
                ["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False, timeout=60
            )
        except subprocess.TimeoutExpired:
            yield Finding(text="launch.engine: slurm: sbatch does not answer within 60 s", here=True)
            return
        said = " ".join(shown.stderr.replace("sbatch: error: ", "").replace("allocation failure: ", "").split())
        if shown.returncode == 0 or any(word in said.lower() for word in _LATER):
            continue
        if "configuration source" in said or "Unable to contact" in said:
            yield Finding(text=f"launch.engine: slurm: {said}", here=True)
            return
        section = _SLURM_SECTIONS[role]
        key = next(key for word, key in _REFUSALS if word in said.lower()).format(section=section)
        found = configuration.value(config, key)
        shown_value = f": {found!r}" if isinstance(found, str | int | float) else ""
        yield Finding(text=f"{key}{shown_value} is refused by Slurm for the {role}: {said}")
