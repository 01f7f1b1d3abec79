"""``ctrl-hpc init`` writes what ``run`` takes, and tells what to fetch."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrl_hpc import cli, preflight
from ctrl_hpc.commands import init
from ctrl_hpc.config import ROOT, load


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shutil.copy(ROOT / "examples" / "own-problems" / "problems.jsonl", tmp_path)
    yield tmp_path


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", {"trainer.device": "cpu", "launch.engine": "local", "data.name": "jsonl"}),
        ("--gpus 1 --data taco", {"trainer.device": "cuda", "launch.engine": "local", "data.name": "taco"}),
        (
            "--gpus 8 --slurm",
            {"parallel.tensor": "4", "rollout.critic_elements": "2", "rollout.generator_elements": "2"},
        ),
        ("--gpus 3 --slurm", {"parallel.tensor": "1", "rollout.critic_elements": "1", "launch.engine": "slurm"}),
        ("--slurm", {"launch.trainer.gpus": "0", "launch.rollout.gpus": "0", "launch.rollout.partition": "gpu"}),
        ("--generator https://h/v1 --generator-model m", {"generator": "https://h/v1", "generator_model": "m"}),
    ],
)
def test_what_it_writes_is_taken(words: str, found: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    from ctrl_hpc.config import value

    assert cli.main(["init", "mine.yaml", *words.split()]) == 0
    said = capsys.readouterr().out
    assert "fetch: hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen/Qwen2.5-0.5B-Instruct" in said
    assert f"ctrl-hpc {'sbatch' if '--slurm' in words else 'run'} mine.yaml" in said
    config = load("mine.yaml")
    assert {key: str(value(config, key)) for key in found} == found
    assert all(finding.here for finding in preflight.findings(config))  # only the models are missing


def test_nothing_is_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.yaml").write_text("mine")
    assert cli.main(["init"]) == 2
    assert "config.yaml: exists; nothing was overwritten" in capsys.readouterr().err
    assert cli.main(["init", "a.yaml", "--gpus", "4", "--no-slurm"]) == 2
    assert "local jobs share the first GPU" in capsys.readouterr().err
    assert cli.main(["init", "a.yaml", "--gpus", "2", "--slurm"]) == 2
    assert cli.main(["init", "a.yaml", "--generator", "http://h/v1"]) == 2
    assert "--generator-model: missing" in capsys.readouterr().err
    assert (here / "config.yaml").read_text() == "mine" and not (here / "a.yaml").exists()


def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["", "my/critic", "", "8", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(said))
    options = cli._parse(["init"])
    answers = init.ask(options, init._prompt)
    assert (answers.data, answers.model, answers.generator) == ("problems.jsonl", "my/critic", "my/critic")
    assert (answers.gpus, answers.slurm) == (8, True)
