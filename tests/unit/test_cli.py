"""The command line answers at once and says what is wrong in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")


def test_help_imports_no_torch() -> None:
    code = "import sys, ctrl_hpc.cli, ctrl_hpc.config, ctrl_hpc.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dry_run_prints_the_whole_configuration_and_takes_overrides_anywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", TINY, f"run_dir={tmp_path / 'r'}", "--dry-run", "rl.steps=7", "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "seed: 3" in out
    assert "steps: 7" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["run", TINY, "rl.stepss=1"], "rl.stepss: unknown key"),
        (["report", TINY, "run_dir={tmp}/r"], "report: needs the records of eval"),
        (
            ["run", TINY, "run_dir={tmp}/r", "generator=/no/such/model"],
            "generator: /no/such/model is not a Hugging Face",
        ),
        (["run", TINY, "run_dir={tmp}/file"], "is a file; choose another run_dir"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rnu configs/tiny.yaml", "ctrl-hpc: COMMAND: there is no 'rnu' (did you mean run?); allowed: init, run, sam"),
        ("serve exectuor --port 1", "ctrl-hpc serve: KIND: there is no 'exectuor' (did you mean executor?); allowed: "),
        (
            "bench trainer --recompute al",
            "--recompute: there is no 'al'; allowed: none, selective, full; see ctrl-hpc b",
        ),
        (
            "run configs/tiny.yaml --dryrun",
            "ctrl-hpc run: --dryrun: no such option (did you mean --dry-run?); see ctrl",
        ),
        ("status runs/a runs/b", "ctrl-hpc status: 'runs/b': one argument too many; see ctrl-hpc status --help"),
        ("status", "ctrl-hpc status: the following arguments are required: RUN; see ctrl-hpc status --help"),
        ("logs runs/a --lines many", "ctrl-hpc logs: --lines: invalid int value: 'many'; see ctrl-hpc logs --help"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_what_was_perhaps_meant(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "serve", "executor"]) == 0
    assert "usage: ctrl-hpc serve executor" in capsys.readouterr().out
    assert cli.main([]) == 0
    assert "usage: ctrl-hpc [-h]" in capsys.readouterr().out
    assert cli.main(["help", "lgos"]) == 2
    assert "help: 'lgos' is no command (did you mean logs?)" in capsys.readouterr().err


def test_version_names_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("ctrl-hpc ") and said.rstrip().endswith(str(ROOT / "ctrl_hpc"))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ctrl-hpc re", ["report "]),
        ("ctrl-hpc run configs/tiny.yaml rl.est", ["rl.estimator="]),
        ("ctrl-hpc run configs/tiny.yaml rl.ratio=", ["rl.ratio=token", "rl.ratio=sequence"]),
        ("ctrl-hpc sft configs/tiny.yaml sft.lora", []),
        ("ctrl-hpc run configs/tiny.yaml --dr", ["--dry-run "]),
    ],
)
def test_tab_completes_commands_options_and_keys(typed: str, offered: list[str], tmp_path: Path) -> None:
    """What the function that ``ctrl-hpc completion bash`` defines asks for."""
    out = tmp_path / "offered"
    asked = {
        **{"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9"},
        **{"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)},
    }
    code = "import sys; from ctrl_hpc.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert [text for text in out.read_text().split("\n") if text] == offered
