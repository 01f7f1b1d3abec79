"""The wheel is the product: installed into an environment outside of the project, it does what a checkout does.

The environment is made by venv and pip from the built wheels; the packages they depend on are those of this one, seen
through a path file, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_hpc.config import ROOT

pytestmark = pytest.mark.slow
Command = Callable[..., subprocess.CompletedProcess[str]]
DRY = """
import json, sys
from ctrl_hpc import cli
for command in json.load(sys.stdin):
    print(cli.main(command), *command, file=sys.stderr)
"""
"""Runs commands in one process, which imports once; tells each's exit status on standard error."""
SMALL = (
    *("data.n_train=24", "data.n_eval=8", "synthesize.n_critiques=12", "sft.epochs=1", "sft.batch_size=8"),
    *("rl.steps=1", "rl.prompts_per_step=4", "rl.group_size=4", "tiny.require_conditions=false", "eval.bootstrap=50"),
    *("eval.turns=1", "eval.greedy=false", "wandb.mode=disabled", "trainer.ranks_per_node=1", "parallel.tensor=1"),
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the two wheels."""
    folder = tmp_path_factory.mktemp("wheel")
    for project in (ROOT, ROOT / "kernels"):
        built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"]
        subprocess.run(built, cwd=project, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    wheels = sorted((folder / "dist").glob("*.whl"))
    assert [wheel.name.partition("-")[0] for wheel in wheels] == ["ctrl_hpc", "ctrl_kernels"]
    pip = [folder / "venv" / "bin" / "pip", "install", "-q", "--no-index", "--no-deps", *wheels]
    subprocess.run(pip, check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing."""
    return tmp_path_factory.mktemp("anywhere")


@pytest.fixture(scope="module")
def command(environment: Path, place: Path) -> Command:
    """``ctrl-hpc ...`` of that environment, from that folder."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        program = [environment / "bin" / "ctrl-hpc", *words]
        return subprocess.run(
            program, cwd=place, env=variables | more, capture_output=True, text=True, check=False, timeout=300
        )

    return run


def test_it_runs_from_its_own_files(environment: Path, command: Command) -> None:
    said = command("--version").stdout
    assert str(environment) in said and "commit" not in said
    done = command("run", "configs/tiny.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"generator: {environment}/lib/" in done.stdout
    assert command("suite", "tiny_ablation", "--dry-run").returncode == 0


def documented() -> list[list[str]]:
    """Commands of the pages that start or explain runs of packaged configurations, each to be run dry."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    found = []
    for line in lines:
        text, _, comment = line.partition(" #")
        own = re.search(r"examples/|my_|problems\.jsonl|=[A-Z_]{3,}", text)  # files of a checkout or of one's own
        if re.match(r"ctrl-hpc (run|suite|config|help) ", text) and "needs:" not in comment and not own:
            words = shlex.split(text)[1:]
            found.append([*words, "--dry-run"] if words[0] in ("run", "suite") and "--dry-run" not in words else words)
    return found


def test_what_the_pages_say_works_without_a_checkout(environment: Path, tmp_path: Path) -> None:
    asked = documented()
    assert len(asked) >= 25
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program = [environment / "bin" / "python", "-c", DRY]
    done = subprocess.run(
        program, cwd=tmp_path, env=variables, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    told = done.stderr.splitlines()
    assert [line for words in asked if (line := f"0 {' '.join(words)}") not in told] == [], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor(command: Command) -> None:
    done = command("doctor", COLUMNS="200")
    assert done.returncode in (0, 1), done.stderr  # it names what this machine lacks
    assert "executor: nsjail" in done.stdout


def test_the_miniature_of_a_few_steps(command: Command, place: Path) -> None:
    done = command("run", "tiny_ci", *SMALL, "eval.critics=[none,rl,oracle]", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    results = json.loads((place / "run" / "report" / "results.json").read_text())
    critics = results["datasets"]["tiny"]["critics"]
    assert set(critics) == {"none", "rl", "oracle"}
    assert critics["oracle"]["pass_at_1"][1] >= critics["none"]["pass_at_1"][1]
    (copy,) = [file for file in (place / "run" / "code").iterdir() if file.is_dir()]
    assert (copy / "configs" / "models.json").is_file() and not (copy / "ctrl_hpc" / "share").exists()


def test_the_oracle_solves_what_it_is_asked(command: Command, place: Path) -> None:
    small = ("generator=oracle", "eval.critics=[none]", "eval.greedy=false", "data.n_eval=4", "run_dir=oracle")
    done = command("eval", "tiny_ci", *small, "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    lines = (place / "oracle" / "eval" / "tiny" / "drafts.jsonl").read_text().splitlines()
    drafts = list(map(json.loads, lines))
    assert [draft["verdict"]["status"] for draft in drafts] == ["accepted"] * 4


def test_sbatch_hands_slurm_the_packaged_script(environment: Path, command: Command, tmp_path: Path) -> None:
    """What sbatch is called with; tests/cluster/test_testcluster.py submits it to a real Slurm."""
    slurm = tmp_path / "sbatch"
    slurm.write_text(
        '#!/bin/sh\ncase "$*" in *--test-only*) exit 0;; esac\n'  # the check before the start
        'printf "%s\\n" "$@" "$CTRL_HPC_PROGRAM" "$CTRL_HPC_SLURM" >&2\nexit 1\n'
    )
    slurm.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = command("sbatch", "tiny_ci", "rl.steps=3", "--partition=cpu", "launch.account=ours", PATH=path)
    assert done.returncode == 2
    words = done.stderr.partition("driver's job: ")[2].split()
    assert words[:4] == ["--parsable", "--account=ours", "--job-name=driver-tiny_ci", words[3]]
    assert words[3].startswith("--output=/") and words[3].endswith("runs/tiny_ci/logs/driver.log")
    assert words[4] == "--partition=cpu"
    assert Path(words[5]).is_file() and Path(words[6]).is_file() and environment in Path(words[5]).parents
    assert words[7:] == ["rl.steps=3", "launch.account=ours", "cluster=slurm", *words[-2:]]
    assert Path(words[-2]) == environment / "bin" / "ctrl-hpc" and (Path(words[-1]) / "guard.sbatch").is_file()
