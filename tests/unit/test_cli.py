"""The command line answers at once and says what is wrong in one line."""

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
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["run", TINY, "--dry-run", "rl.steps=7", "seed=3"]) == 0
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


def test_unknown_options_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", TINY, "--fast"])
    assert caught.value.code == 2
