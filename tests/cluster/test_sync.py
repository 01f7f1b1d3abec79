"""What a run journalled, sent to a loopback server by the real wandb: once, whole, and in one line where it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import wandb_server
from wandb_server import Store

from ctrl_hpc.cli import main
from ctrl_hpc.config import ROOT, Config, dump, load
from ctrl_hpc.run.journal import Artifact, Journal, Table, journals
from ctrl_hpc.tracking import mirror, sync
from ctrl_hpc.tracking.marks import run_id
from ctrl_hpc.tracking.mirror import LiveMirror


@pytest.fixture
def config(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(mirror, "LOOK_S", 0.05)
    made = load(ROOT / "configs" / "tiny_faults.yaml", [f"run_dir={run_dir}", "wandb.group=experiment 7"])
    (run_dir / "config.yaml").write_text(dump(made))
    return made


def log(run_dir: Path, steps: range) -> None:
    """Lines of an element, with its step in place of the time of day."""
    writer = Journal(run_dir, "executor", 0)
    for step in steps:
        writer.log(step, {"executor/runs_per_s": step / 2})


def steps_of(server: Store, run_dir: Path, name: str = "executor-0") -> list[int]:
    return [row["step"] for row in server.runs[run_id(run_dir, name)]["rows"]]


@pytest.mark.slow
def test_journals_are_sent_once_with_what_came_since(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "report").mkdir()
    (run_dir / "report" / "plot.png").write_bytes(b"png")
    report = Artifact(name="tiny-report", type="report", path=run_dir / "report")
    with LiveMirror(config, run_dir):
        log(run_dir, range(3))
        log(run_dir, range(3, 5))  # the job was requeued
        Journal(run_dir, "report").log(
            *(0, {"eval/pass_at_1": 0.5}), artifacts=[report], summary={"eval/pass_at_1": 0.5}
        )
    executor = run_id(run_dir, "executor-0")
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert f"{executor}: sending 5 steps" in said and "2 sent" in said
    run = server.runs[executor]
    assert (run["group"], run["type"], run["config"]["rl"]["steps"]) == ("experiment 7", "executor", 8)
    assert [(row["step"], row["executor/runs_per_s"]) for row in run["rows"]] == [(i, i / 2) for i in range(5)]
    assert ("report", "tiny-report") in server.artifacts and server.files["plot.png"] == b"png"
    assert server.runs[run_id(run_dir, "report")]["summary"]["eval/pass_at_1"] == 0.5
    assert len(list(run_dir.glob("wandb/offline-run-*/*.synced"))) == 2  # `wandb sync` leaves them

    assert main(["sync", str(run_dir)]) == 0  # nothing is sent twice
    assert f"{executor}: sent before" in capsys.readouterr().out
    with LiveMirror(config, run_dir):
        log(run_dir, range(5, 6))  # it went on after the sync
    assert main(["sync", str(run_dir)]) == 0
    assert f"{executor}: sending 1 steps" in capsys.readouterr().out
    assert main(["sync", str(run_dir), "--again"]) == 0
    assert steps_of(server, run_dir) == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_what_the_server_lost_of_a_sync_is_asked_for_and_sent(server: Store, config: Config, run_dir: Path) -> None:
    log(run_dir, range(6))  # no driver's mirror ever saw it
    assert main(["sync", str(run_dir)]) == 0
    del server.runs[run_id(run_dir, "executor-0")]["rows"][2:]
    assert main(["sync", str(run_dir), "--again"]) == 0
    assert steps_of(server, run_dir) == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in (run_dir / "wandb").iterdir()] == []


@pytest.mark.slow
def test_pieces_that_wandb_sync_sent_are_not_sent_again(server: Store, config: Config, run_dir: Path) -> None:
    with LiveMirror(config, run_dir):
        log(run_dir, range(3))
    (piece,) = run_dir.glob("wandb/offline-run-*")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(piece)], check=True, env=environment)
    log(run_dir, range(3, 5))
    assert main(["sync", str(run_dir)]) == 0
    assert steps_of(server, run_dir) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_folders_that_the_roles_of_an_earlier_version_wrote_are_sent_in_order(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (range(3), range(3, 5)):  # two starts of the role
        with LiveMirror(config, run_dir):
            log(run_dir, steps)
    shutil.rmtree(run_dir / "journals")
    trained = [{"step": step, "rl/reward": 0.5} for step in range(4)]
    Journal(run_dir, "rl").file.write_text("".join(f"{line}\n".replace("'", '"') for line in trained))
    piece = run_dir / "wandb" / f"offline-run-20260101_000000-{run_id(run_dir, 'rl')}"
    (piece / "files").mkdir(parents=True)  # as every folder of that version has
    shutil.copy(min(run_dir.glob("wandb/offline-run-*/*.wandb")), piece / f"run-{run_id(run_dir, 'rl')}.wandb")
    with LiveMirror(config, run_dir):
        Journal(run_dir, "rl", start=2).log(2, {"rl/reward": 1.0})  # RL goes on with this version
        for step in (3, 4, 5):
            Journal(run_dir, "rl").log(step, {"rl/reward": 1.0})
    assert main(["sync", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("sending offline-run-") == 3
    assert steps_of(server, run_dir) == [
        0,
        1,
        2,
        0,
        1,
        2,
        3,
        4,
    ]  # the file that is named after RL holds the first three
    assert steps_of(server, run_dir, "rl") == [4, 5]  # the steps before are in its piece
    assert main(["sync", str(run_dir)]) == 0
    assert "0 sent" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_refuses_is_one_line_and_the_next_call_sends_all(
    server: Store, config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log(run_dir, range(2))
    for status, told in ((401, "does not take the key (HTTP 401)"), (503, "try again later (HTTP 503)")):
        server.refuse = lambda path, status=status: status  # type: ignore[misc]
        assert main(["sync", str(run_dir)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ctrl-hpc: not sent: http://127.0.0.1") and told in line
    with monkeypatch.context() as patch:
        patch.setattr(sync.server, "check", lambda url: None)  # refused in the middle: at once, then when it has begun
        for refused in (lambda path: 401, lambda path: 401 if "file_stream" in path else 0):
            server.refuse = refused
            assert main(["sync", str(run_dir)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert "401" in line and line.endswith("; the same command sends what is left")
    server.refuse = lambda path: 0
    assert main(["sync", str(run_dir)]) == 0
    assert steps_of(server, run_dir) == [0, 1]


@pytest.mark.slow
def test_critics_of_a_run_arrive_as_artifacts(server: Store, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["wandb.checkpoints=all", "stages=[sample,synthesize,sft,eval,report]", "eval.critics=[none,sft]"]
    small = ["data.n_train=32", "data.n_eval=4", "synthesize.n_critiques=24", "sft.batch_size=8", "sft.save_every=1"]
    run = ["run", str(ROOT / "configs" / "tiny_faults.yaml"), f"run_dir={run_dir}", "wandb.services=false"]
    assert main([*run, *options, *small]) == 0
    lines = {name: sync.journal.lines(file) for name, file in journals(run_dir).items()}
    kept = {
        name: [item["path"] for line in of for item in line.get("artifacts", []) if item["type"] == "model"]
        for name, of in lines.items()
    }
    # of three saves the last one is the final critic
    assert kept == {"sft": ["sft/kept/step-000001", "sft/kept/step-000002"], "report": ["sft/hf"]}
    names = {
        name for of in lines.values() for line in of for item in line.get("artifacts", []) for name in item["files"]
    }
    assert {"model.safetensors", "config.json", "tokenizer.json", "results.json"} <= names

    weights, other = run_dir / "sft" / "kept" / "step-000001" / "model.safetensors", run_dir / "elsewhere"
    weights.rename(other)
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "not sent whole: a file of artifact tiny_faults-sft: " in line and "no such file" in line
    assert server.artifacts.count(("model", "tiny_faults-sft")) == 2
    assert ("report", "tiny_faults-report") in server.artifacts
    server.artifacts.clear()
    other.rename(weights)
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "2.9 MB model tiny_faults-sft (2 versions)" in said and "report: sent before" in said
    assert server.artifacts == [("model", "tiny_faults-sft")] * 2  # of the same content: no new version
    assert server.files["model.safetensors"] in [
        (run_dir / path / "model.safetensors").read_bytes() for path in kept["sft"]
    ]
    assert steps_of(server, run_dir, "sft") == [0, 1, 2]
    (table,) = [data for name, data in server.files.items() if name == "eval_samples.table.json"]
    assert b"critique" in table


@pytest.mark.slow
def test_a_refused_upload_is_told_and_only_what_is_missing_sent_again(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "critic").mkdir()
    (run_dir / "critic" / "weights").write_bytes(b"weights")
    critic = Artifact(name="critic", type="model", path=run_dir / "critic")
    table = Table(columns=["id"], rows=[["a"]])
    log(run_dir, range(3))
    Journal(run_dir, "executor", 0).log(3, {"executor/queue": 1.0}, artifacts=[critic], tables={"rl/samples": table})
    log(run_dir, range(4, 6))
    for place, told in (("/weights", "weights: "), ("table.json", "table.json: ")):
        server.refuse = lambda path, place=place: 403 if path.endswith(place) else 0  # type: ignore[misc]
        assert main(["sync", str(run_dir)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run_id(run_dir, 'executor-0')}: not sent whole: " in line and told in line and "403 Forbidden" in line
        assert line.endswith("the same command sends what is left")
        assert steps_of(server, run_dir) == [0, 1, 2, 3, 4, 5]
    assert not [name for name in server.files if "samples_summary" in name]
    server.refuse = lambda path: 0
    for again in ([], [], ["--again"]):
        assert main(["sync", str(run_dir), *again]) == 0
        assert steps_of(server, run_dir) == [0, 1, 2, 3, 4, 5] and server.files["weights"] == b"weights"
        path = server.runs[run_id(run_dir, "executor-0")]["summary"]["rl/samples"]["path"]
        assert b'"data":[["a"]]' in server.files[path.rpartition("/")[2]]  # what the table's panel shows


@pytest.mark.slow
def test_a_server_that_fails_is_told_of_and_ctrl_c_ends_the_sync(server: Store, config: Config, run_dir: Path) -> None:
    log(run_dir, range(3))
    server.refuse = lambda path: 500 if "/put/" in path else 0
    command = [sys.executable, "-m", "ctrl_hpc.cli", "sync", str(run_dir)]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **told, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True) as work:
        assert "sending 3 steps" in work.stdout.readline()
        assert "asking again, Ctrl-C ends it" in work.stdout.readline()
        os.killpg(work.pid, signal.SIGINT)  # as a terminal does
        _, errors = work.communicate(timeout=60)
    assert (work.returncode, errors) == (1, "ctrl-hpc: stopped; the same command continues where it stopped\n")
    server.refuse = lambda path: 0
    for _ in range(2):
        assert main(["sync", str(run_dir)]) == 0
        assert steps_of(server, run_dir) == [0, 1, 2] and "config.yaml" in server.files


def test_no_key_and_no_server_are_one_line(
    config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log(run_dir, range(1))
    monkeypatch.setattr(mirror, "server_url", lambda: "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["sync", str(run_dir)]) == 1
    assert "not sent: no key for http://127.0.0.1:9; run `wandb login`" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ctrl-hpc: not sent: http://127.0.0.1:9 cannot be reached: ")


def test_a_folder_without_journals_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run_dir)]) == 2
    assert "no journals of a run there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_sent_once(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(ROOT / "tests" / "data" / "run_of_8c4b07b.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    old = tmp_path / "old"
    server.refuse = lambda path: 403 if path.endswith("model.safetensors") else 0
    assert main(["sync", str(old)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run_id(old, 'report')}: not sent whole: " in line and "403" in line
    server.refuse = lambda path: 0
    for sent in (1, 0):  # the others are there
        assert main(["sync", str(old)]) == 0
        assert f"{sent} sent" in capsys.readouterr().out
        for stage, name in (("sft", "sft/loss"), ("rl", "rl/reward")):
            lines = sync.journal.lines(old / stage / "metrics.jsonl")
            found = [(row["step"], row[name]) for row in server.runs[run_id(old, stage)]["rows"] if name in row]
            assert found == [(line["step"], line[name]) for line in lines] and found
    results = json.loads((old / "report" / "results.json").read_text())["datasets"]["tiny"]["critics"]
    report = server.runs[run_id(old, "report")]
    assert report["summary"]["eval/tiny/rl/pass_at_1"] == results["rl"]["pass_at_1"][1]
    assert {run["type"] for run in server.runs.values()} == {"sft", "rl", "executor", "critic", "generator", "report"}
    assert {run["group"] for run in server.runs.values()} == {"old"}
    assert len([name for name in server.files if name.startswith("samples_")]) == 3
    assert {("report", "old-report"), ("model", "old-sft"), ("model", "old-rl")} < set(server.artifacts)
