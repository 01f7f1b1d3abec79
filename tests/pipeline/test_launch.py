"""The same run from Python: returns at once, waits, gives results, stops, says what went wrong."""

from pathlib import Path

import pytest
from process_table import processes_of

import ctrl_hpc
from ctrl_hpc.config import ROOT, load

CONFIG = ROOT / "configs" / "tiny_ci.yaml"
SMALL = ("generator=oracle", "stages=[eval,report]", "eval.critics=[none]", "eval.greedy=false", "eval.turns=1")
SMALL += ("data.n_eval=8", "wandb.mode=disabled")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_canonical_solutions_pass_every_test(tmp_path: Path) -> None:
    run = ctrl_hpc.launch(CONFIG, *SMALL, f"run_dir={tmp_path / 'run'}")
    with pytest.raises(TimeoutError, match="still running"):
        run.wait(timeout_s=0.01)
    results = run.results()
    assert results["datasets"]["tiny"]["critics"]["none"]["pass_at_1"] == [1.0, 1.0]
    assert run.driver.poll() == 0
    assert run.jobs == []


def test_stop_ends_everything(tmp_path: Path) -> None:
    run = ctrl_hpc.launch(load(CONFIG, [*SMALL, "data.n_eval=400", f"run_dir={tmp_path / 'run'}"]))
    run.stop()
    assert run.driver.poll() is not None
    with pytest.raises(RuntimeError, match="the run ended with exit code"):
        run.wait()
    assert processes_of(tmp_path) == []


def test_a_wrong_configuration_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rl.stepss: unknown key"):
        ctrl_hpc.launch(CONFIG, "rl.stepss=1", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="overrides go with the path"):
        ctrl_hpc.launch(load(CONFIG), "rl.steps=1")
    assert not (tmp_path / "run").exists()
