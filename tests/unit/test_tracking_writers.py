"""TensorBoard and MLflow by their own writers, read back by their own readers: each line of each journal once."""

import json

import pytest

from ctrl_hpc import cli, preflight
from ctrl_hpc.config import ROOT, dump, load
from ctrl_hpc.run.journal import Journal, Table
from ctrl_hpc.tracking import writers

PNG = ROOT / "docs" / "learning-curve.png"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config(folder)))
    return folder


def config(folder, *more):
    return load(ROOT / "configs" / "tiny_faults.yaml", [f"run_dir={folder}", "wandb.mode=disabled", *more])


def train(run_dir, start, stop):
    writer = Journal(run_dir, "rl", start=start)
    for step in range(start, stop):
        tables = {"rl/samples": Table(columns=["id", "text"], rows=[["a|b", "x\ny"]])} if step == 1 else {}
        writer.log(step, {"rl/reward": step / 8, "began_wait": 1.0}, tables=tables, steps=9)


def events(run_dir, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tensorboard" / name), size_guidance={"scalars": 0})
    read.Reload()
    return read


@pytest.mark.slow  # the readers' imports
def test_tensorboard_has_every_line_once(run_dir):
    train(run_dir, 0, 3)
    with writers.LiveWriters(config(run_dir, "tracking.writers=[tensorboard]"), run_dir):
        train(run_dir, 3, 5)
        train(run_dir, 4, 6)  # a trainer that goes on from a checkpoint
        Journal(run_dir, "report").log(0, {"eval/pass_at_1": 0.75}, images=[PNG])
    read = events(run_dir, "rl")
    assert read.Tags()["scalars"] == ["rl/reward"]
    points = read.Scalars("rl/reward")
    assert [(point.step, point.value) for point in points] == [(step, step / 8) for step in range(6)]
    lines = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert points[0].wall_time == pytest.approx(lines[0]["time"])
    (text,) = read.Tensors("rl/samples/text_summary")
    assert b"| a\\|b | x<br>y |" in text.tensor_proto.string_val[0]
    report = events(run_dir, "report")
    (image,) = report.Images(PNG.stem)
    assert image.width > 400
    # a later start writes the files anew: nothing is there twice
    with writers.LiveWriters(config(run_dir, "tracking.writers=[tensorboard]"), run_dir):
        pass
    assert len(events(run_dir, "rl").Scalars("rl/reward")) == 6


@pytest.mark.slow  # the client's import
def test_mlflow_has_every_line_once(run_dir, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ours = config(run_dir, "tracking.writers=[mlflow]", "tracking.mlflow_experiment=ours")
    train(run_dir, 0, 3)
    with writers.LiveWriters(ours, run_dir):
        pass
    train(run_dir, 2, 5)
    with pytest.raises(KeyboardInterrupt), writers.LiveWriters(ours, run_dir):
        Journal(run_dir, "report").log(0, {"eval/pass_at_1": 0.75})
        raise KeyboardInterrupt
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file://{run_dir}/mlflow")
    experiment = client.get_experiment_by_name("ours")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "tiny_faults-rl": "FAILED",
        "tiny_faults-report": "FAILED",
    }
    run = runs["tiny_faults-rl"]
    points = client.get_metric_history(run.info.run_id, "rl/reward")
    assert [(point.step, point.value) for point in points] == [(step, step / 8) for step in range(5)]
    assert run.data.params["rl.estimator"] == ours.rl.estimator
    assert run.data.tags["ctrl_hpc.journal"] == "rl"
    assert "began_wait" not in run.data.metrics
    # what a run was told is not told again
    assert cli.main(["track", str(run_dir), "mlflow"]) == 0
    assert len(client.get_metric_history(run.info.run_id, "rl/reward")) == 5


@pytest.mark.slow
def test_a_server_that_fails_ends_no_run(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(run_dir, 0, 2)
    ours = config(run_dir, "tracking.writers=[mlflow]", "tracking.mlflow_uri=http://127.0.0.1:9")
    with writers.LiveWriters(ours, run_dir):
        pass
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert told[0].startswith("mlflow: ") and told[0].endswith(
        f"ctrl-hpc track {run_dir} mlflow tells it what it lacks"
    )


def test_a_missing_package_is_one_line_before_anything_starts(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    ours = config(run_dir, "tracking.writers=[tensorboard]", "stages=[sample]")
    said = [finding for finding in preflight.findings(ours) if finding.text.startswith("tracking.writers")]
    assert [(finding.text, finding.here) for finding in said] == [
        (
            "tracking.writers: tensorboard needs the package tensorboard; "
            "install it: pip install 'ctrl-hpc[tensorboard]'",
            True,
        )
    ]
    assert cli.main(["track", str(run_dir), "mlflow"]) == 2
    assert "needs the package mlflow-skinny" in capsys.readouterr().err
