"""``ctrl-hpc init``: a commented configuration for one's own model, problems and machines."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ctrl_hpc.commands.output import place

_ONE_NODE = 8
"""GPUs of a node at most, where the site's profile is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a configuration is made of."""

    model: str
    """Folder or hub id of the critic."""
    generator: str
    """The same, or a URL, of the fixed generator."""
    generator_model: str
    """The name of the endpoint's model; empty for a folder."""
    data: str
    """File of problems in our schema, or the name of a data set."""
    gpus: int
    """Of the node; 0: the CPU."""
    slurm: bool


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; what is missing is asked for on a terminal."""
    parser.description = "Questions are asked on a terminal for what no option says; else defaults hold."
    parser.add_argument("file", nargs="?", type=place, default=Path("config.yaml"), metavar="FILE.yaml")
    parser.add_argument(
        "--model", default=None, help="critic: a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-0.5B"
    )
    parser.add_argument(
        "--generator", default=None, help="the fixed generator: the same, or a URL (default: the critic's)"
    )
    parser.add_argument("--generator-model", default=None, help="name of the model behind a URL")
    parser.add_argument("--data", default=None, help="a JSONL file of problems, or a data set by name")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs of the node; 0: the CPU (default: 0)")
    parser.add_argument("--slurm", action=argparse.BooleanOptionalAction, default=None, help="jobs are Slurm's")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Ask, write, and say what comes next; nothing is written over."""
    answers = ask(options, _prompt if sys.stdin.isatty() else None)
    file: Path = options.file
    profile = file.with_name(f"{file.stem}-slurm.yaml")
    for target in (file, *([profile] if answers.slurm else [])):
        if target.exists():
            raise ValueError(f"{target}: exists; nothing was overwritten; name another file")
        if not target.absolute().parent.is_dir():
            raise ValueError(f"{target}: its folder {target.absolute().parent} does not exist")
    text = written(answers, file.stem, profile.name)
    if answers.slurm:
        from ctrl_hpc.config import SHARE

        profile.write_text((SHARE / "configs" / "cluster" / "slurm.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    print("\n".join(_next_steps(answers, file, profile)))
    return 0


def ask(options: argparse.Namespace, prompt: Callable[[str, str], str] | None) -> Answers:
    """What the options say, else the answers, else defaults. Raises ValueError for what cannot be."""
    from ctrl_hpc.config.facts import is_url

    def answer(given: str | None, question: str, default: str) -> str:
        return given if given is not None else prompt(question, default) if prompt else default

    data = answer(options.data, "Problems: a JSONL file, or a data set (taco, mbpp, ...)", "problems.jsonl")
    model = answer(options.model, "Critic: a Hugging Face folder or hub id", "Qwen/Qwen2.5-0.5B-Instruct")
    generator = answer(options.generator, "Fixed generator: the same, or the URL of an endpoint", model)
    served_elsewhere = is_url(generator)
    name = answer(options.generator_model, "Name of the endpoint's model", "") if served_elsewhere else ""
    if served_elsewhere and not name:
        raise ValueError("--generator-model: missing; a generator that is a URL needs the name of its model")
    gpus = options.gpus
    if gpus is None:
        text = answer(None, "GPUs of the node (0: the CPU)", "0")
        if not text.isdigit():
            raise ValueError(f"--gpus: {text!r} is not a whole number")
        gpus = int(text)
    slurm = options.slurm
    if slurm is None:
        slurm = answer(None, "Jobs on Slurm? (y/n)", "y" if gpus > 1 else "n").lower().startswith("y")
    if not 0 <= gpus <= _ONE_NODE:
        raise ValueError(f"--gpus: {gpus} is not allowed; it must lie in [0, {_ONE_NODE}]: the GPUs of one node")
    if gpus > 1 and not slurm:
        raise ValueError(f"--gpus: {gpus} without Slurm: local jobs share the first GPU; use --gpus 1 or --slurm")
    if slurm and gpus in (1, 2):
        raise ValueError(
            f"--gpus: {gpus} with Slurm: trainer, critic's and generator's server need one each: 0 or 3 to 8"
        )
    return Answers(model=model, generator=generator, generator_model=name, data=data, gpus=gpus, slurm=slurm)


def written(answers: Answers, name: str, profile: str) -> str:
    """The configuration's text."""
    from ctrl_hpc.data.catalog import DATASETS

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # a power of two, so that the heads of attention can be shared out
    ranks = 1 if answers.gpus < 4 or not answers.slurm else 4 if answers.gpus == _ONE_NODE else 2
    servers = max(0, answers.gpus - ranks)
    return environment.get_template("init.yaml.j2").render(
        answers=answers,
        name=name,
        profile=profile,
        named=answers.data in DATASETS,
        ranks=ranks,
        critic_servers=max(1, servers // 2) if answers.slurm else 1,
        generator_servers=max(1, servers - servers // 2) if answers.slurm else 1,
    )


def _next_steps(answers: Answers, file: Path, profile: Path) -> list[str]:
    """What to do now, in lines."""
    out = [f"{file}: written" + (f"; {profile}: your site's partitions and account go there" if answers.slurm else "")]
    places = dict.fromkeys([answers.model, *([] if answers.generator_model else [answers.generator])])
    for model in places:
        if not Path(model).expanduser().is_dir():
            out.append(f"fetch: hf download {model} --local-dir {model}")
    if not Path(answers.data).exists() and answers.data.endswith(".jsonl"):
        out.append(f"write: {answers.data}, a problem a line (docs/your-data.md; examples/own-problems has twelve)")
    if answers.generator_model and not os.environ.get("OPENAI_API_KEY"):
        out.append("export OPENAI_API_KEY=...   (or another variable: endpoint.key_env)")
    out.append(f"look:  ctrl-hpc run {file} --dry-run")
    out.append(f"run:   ctrl-hpc {'sbatch' if answers.slurm else 'run'} {file}")
    return out


def _prompt(question: str, default: str) -> str:
    return input(f"{question} [{default}]: ").strip() or default
