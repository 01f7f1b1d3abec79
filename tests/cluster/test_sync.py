"""A run's offline wandb files, sent to a loopback server by the real `wandb sync`; and what array elements log."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import wandb_server
from wandb_server import Store

from ctrl_hpc.cli import main
from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.tracking import service_log, sync, wandb_file
from ctrl_hpc.tracking.tracker import Tracker, run_id

BLOCK = wandb_file.BLOCK_BYTES


@pytest.fixture
def config(run_dir: Path) -> Config:
    return load(ROOT / "configs" / "tiny_faults.yaml", [f"run_dir={run_dir}", "wandb.group=experiment 7"])


def log(config: Config, run_dir: Path, steps: range) -> None:
    with Tracker(config, run_dir, "executor", 0) as tracker:
        for step in steps:
            tracker.log({"executor/runs_per_s": step / 2}, step)


@pytest.mark.slow
def test_pieces_of_a_requeued_job_become_one_run_in_order(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(config, run_dir, range(3))
    log(config, run_dir, range(3, 5))  # the job was requeued
    (run_dir / "report").mkdir()
    (run_dir / "report" / "plot.png").write_bytes(b"png")
    with Tracker(config, run_dir, "report") as tracker:
        tracker.log({"eval/pass_at_1": 0.5}, 0)
        tracker.artifact(run_dir / "report", "report", "tiny-report")
    executor = run_id(run_dir, "executor", 0)
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert f"{executor}: sending 2 of 2 pieces" in said and "3 pieces sent" in said
    run = server.runs[executor]
    assert (run["group"], run["type"], run["config"]["rl"]["steps"]) == ("experiment 7", "executor", 8)
    numbers = [(row["step"], row["executor/runs_per_s"]) for row in run["rows"] if "executor/runs_per_s" in row]
    assert numbers == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert ("report", "tiny-report") in server.artifacts and server.files["plot.png"] == b"png"
    assert server.runs[run_id(run_dir, "report")]["summary"]["eval/pass_at_1"] == 0.5

    assert main(["sync", str(run_dir)]) == 0  # nothing is sent twice
    assert f"{executor}: sent before" in capsys.readouterr().out
    log(config, run_dir, range(5, 6))  # it went on after the sync
    assert main(["sync", str(run_dir)]) == 0
    assert f"{executor}: sending 1 of 3 pieces" in capsys.readouterr().out
    numbers = [row["step"] for row in run["rows"] if "executor/runs_per_s" in row]
    assert numbers == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_what_a_killed_process_left_is_sent_up_to_its_damage(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (range(3), range(3, 5), range(5, 6)):
        log(config, run_dir, steps)
    (parts,) = sync.pieces(run_dir).values()
    whole = parts[0].file.read_bytes()
    parts[0].file.write_bytes(whole[:-3])
    parts[1].file.write_bytes(b"")  # killed before it wrote
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "cut short when it was written" in said and "sending 2 of 3 pieces" in said
    assert Path(f"{parts[0].file}.damaged").read_bytes() == whole[:-3]
    (run,) = server.runs.values()
    assert [row["step"] for row in run["rows"] if "executor/runs_per_s" in row] == [0, 1, 2, 5]
    assert main(["sync", str(run_dir)]) == 0
    assert "0 pieces sent" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_refuses_is_one_line_and_the_next_call_sends_all(
    server: Store, config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log(config, run_dir, range(2))
    for status, told in ((401, "does not take the key (HTTP 401)"), (503, "try again later (HTTP 503)")):
        server.refuse = lambda path, status=status: status  # type: ignore[misc]
        assert main(["sync", str(run_dir)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ctrl-hpc: not sent: http://127.0.0.1") and told in line
    server.refuse = lambda path: 401
    with monkeypatch.context() as patch:
        patch.setattr(sync, "check_server", lambda: None)  # refused in the middle
        assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not sent: the server refused it; the same command sends what is left" in line and server.runs == {}
    server.refuse = lambda path: 0
    assert main(["sync", str(run_dir)]) == 0
    (run,) = server.runs.values()
    assert [row["step"] for row in run["rows"] if "executor/runs_per_s" in row] == [0, 1]


@pytest.mark.slow
def test_critics_of_a_run_arrive_as_artifacts(server: Store, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["wandb.checkpoints=all", "stages=[sample,synthesize,sft,eval,report]", "eval.critics=[none,sft]"]
    small = ["data.n_train=32", "data.n_eval=4", "synthesize.n_critiques=24", "sft.batch_size=8", "sft.save_every=1"]
    run = ["run", str(ROOT / "configs" / "tiny_faults.yaml"), f"run_dir={run_dir}", "wandb.services=false"]
    assert main([*run, *options, *small]) == 0
    found = {
        id: [item for piece in parts for item in wandb_file.artifacts(piece.file) if item.type == "model"]
        for id, parts in sync.pieces(run_dir).items()
    }
    kept = [run_dir / "sft" / "kept" / f"step-00000{step}" for step in (1, 2)]  # of three; the last one is the final
    folders = {id: [item.files[0].parent for item in items] for id, items in found.items()}
    assert folders == {run_id(run_dir, "sft"): kept, run_id(run_dir, "report"): [run_dir / "sft" / "hf"]}
    names = {file.name for items in found.values() for item in items for file in item.files}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert all(item.name == "tiny_faults-sft" and item.size > 1e6 for items in found.values() for item in items)

    weights, other = kept[0] / "model.safetensors", run_dir / "elsewhere"
    weights.rename(other)
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "not sent whole: a file of an artifact: " in line and "no such file" in line
    assert server.artifacts.count(("model", "tiny_faults-sft")) == 3
    assert ("report", "tiny_faults-report") in server.artifacts
    server.artifacts.clear()
    other.rename(weights)
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "2.9 MB model tiny_faults-sft (2 versions)" in said and "report: sent before" in said
    assert server.artifacts == [("model", "tiny_faults-sft")] * 2
    assert server.files["model.safetensors"] in [(folder / "model.safetensors").read_bytes() for folder in kept]
    (table,) = [data for name, data in server.files.items() if name == "eval_samples.table.json"]
    assert b"critique" in table


def steps_of(server: Store, id: str) -> list[int]:
    return [row["step"] for row in server.runs[id]["rows"] if "executor/runs_per_s" in row]


@pytest.mark.slow
def test_a_refused_upload_is_told_and_only_what_is_missing_sent_again(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "critic").mkdir()
    (run_dir / "critic" / "weights").write_bytes(b"weights")
    with Tracker(config, run_dir, "executor", 0) as tracker:
        for step in range(3):
            tracker.log({"executor/runs_per_s": step / 2}, step)
        tracker.artifact(run_dir / "critic", "model", "critic")
    log(config, run_dir, range(3, 5))
    server.refuse = lambda path: 403 if path.endswith("/weights") else 0
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (id,) = sync.pieces(run_dir)
    told = f"{id}: not sent whole: a file of an artifact: weights: 403 Forbidden; the same command tries again"
    assert line == f"ctrl-hpc: {told}"
    assert [piece.sent for piece in sync.pieces(run_dir)[id]] == [False, True]
    assert steps_of(server, id) == [0, 1, 2, 3, 4] and "weights" not in server.files
    server.refuse = lambda path: 0
    server.runs[id]["summary"]["executor/runs_per_s"] = "the last piece's"
    assert main(["sync", str(run_dir)]) == 0
    assert "sending 1 of 2 pieces" in capsys.readouterr().out
    assert steps_of(server, id) == [0, 1, 2, 3, 4] and server.files["weights"] == b"weights"
    assert server.runs[id]["summary"]["executor/runs_per_s"] == "the last piece's"
    assert main(["sync", str(run_dir), "--again"]) == 0
    assert steps_of(server, id) == [0, 1, 2, 3, 4] and list(run_dir.rglob("rest-*")) == []


@pytest.mark.slow
def test_a_server_that_fails_is_told_of_and_ctrl_c_ends_the_sync(server: Store, config: Config, run_dir: Path) -> None:
    log(config, run_dir, range(3))
    (id,) = sync.pieces(run_dir)
    server.refuse = lambda path: 500 if "/put/" in path else 0
    command = [sys.executable, "-m", "ctrl_hpc.cli", "sync", str(run_dir)]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **told, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True) as work:
        assert "sending 1 of 1 pieces" in work.stdout.readline()
        assert "fails (HTTP status 500 Internal Server Error); asking again" in work.stdout.readline()
        os.killpg(work.pid, signal.SIGINT)  # as a terminal does
        _, errors = work.communicate(timeout=60)
    assert (work.returncode, errors) == (1, "ctrl-hpc: stopped; the same command continues where it stopped\n")
    assert not sync.pieces(run_dir)[id][0].sent
    server.refuse = lambda path: 0
    for _ in range(2):
        assert main(["sync", str(run_dir)]) == 0
        assert steps_of(server, id) == [0, 1, 2] and "config.yaml" in server.files


def test_the_rest_of_a_record_file_is_its_records_without_the_first_rows(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import HistoryRecord, Record, RunRecord, SummaryRecord

    run = Record(run=RunRecord(entity="team", project="p", run_id="x"))
    rows = [Record(num=number, history=HistoryRecord()) for number in range(3)]
    rows[1].history.item.add(key="text", value_json="a" * 70_000)  # over three blocks
    summary = Record(num=9, summary=SummaryRecord())
    data = [record.SerializeToString() for record in (run, *rows, summary)]
    file, rest = tmp_path / "run-x.wandb", tmp_path / "rest.wandb"
    wandb_file.write(file, b":W&B" + bytes(3), data)
    assert [payload for _, payload in wandb_file.records(file.read_bytes())] == data
    assert wandb_file.run_of(file) == ("team", "p", "x")
    for skipped, with_summary, kept in ((0, True, [0, 1, 2, 3, 4]), (1, True, [0, 2, 3, 4]), (7, False, [0])):
        wandb_file.rest(file, rest, skipped, summary=with_summary)
        assert [payload for _, payload in wandb_file.records(rest.read_bytes())] == [data[index] for index in kept]


def test_no_key_and_no_server_are_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").write_bytes(b":W&B" + bytes(3) + chunk(1, b"record"))
    monkeypatch.setattr(sync, "server_url", lambda: "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["sync", str(run_dir)]) == 1
    assert "no key for http://127.0.0.1:9; run `wandb login`" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ctrl-hpc: not sent: http://127.0.0.1:9 cannot be reached: ")


def chunk(kind: int, data: bytes) -> bytes:
    """A chunk of LevelDB's log, as wandb writes it."""
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def test_the_whole_part_of_a_record_file_ends_at_a_record() -> None:
    head, one = b":W&B" + bytes(3), chunk(1, b"record")
    room = BLOCK - len(head + one) - 7
    first, last = chunk(2, bytes(room)), chunk(4, b"end")  # a record over two blocks
    data = head + one + first + last
    assert len(head + one + first) == BLOCK
    assert wandb_file.whole_bytes(data) == len(data)
    assert wandb_file.whole_bytes(data[:-1]) == len(head + one)  # its last part is not whole, so none of it is
    assert wandb_file.whole_bytes(data[:BLOCK]) == len(head + one)
    assert wandb_file.whole_bytes(head + one[:-1] + b"x") == len(head) == 7
    padded = head + one + chunk(1, bytes(room - 3)) + bytes(3) + one  # three bytes at a block's end hold no chunk
    assert wandb_file.whole_bytes(padded) == BLOCK + len(one)
    assert wandb_file.whole_bytes(b"") == wandb_file.whole_bytes(b"nothing of wandb's") == 0


def test_a_run_without_wandb_files_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run_dir)]) == 2
    assert "no offline wandb runs there" in capsys.readouterr().err


def test_pieces_are_ordered_by_their_start(run_dir: Path) -> None:
    for started in ("20260102_000000", "20260101_235959"):
        folder = run_dir / "wandb" / f"offline-run-{started}-x-1"
        folder.mkdir(parents=True)
        (folder / "run-x-1.wandb").touch()
    (found,) = sync.pieces(run_dir).values()
    assert [piece.started for piece in found] == ["20260101_235959", "20260102_000000"]


def test_counters_become_rates_and_gauges_stay() -> None:
    before = service_log.read("# HELP x y\nexecutor_runs_total 10.0\nexecutor_queue_length 7.0\n")
    after = service_log.read('executor_runs_total 40.0\nexecutor_queue_length 3.0\nexecutor_verdicts{a="b"} 1.0\n')
    assert service_log.rates(before, after, 10.0) == {"executor/runs_per_s": 3.0, "executor/queue": 3.0}
    served = service_log.read("ctrl_rollout_completion_tokens_total 600\nctrl_rollout_waiting 2\n")
    assert service_log.rates({}, served, 2.0) == {"rollout/tokens_per_s": 300.0, "rollout/queue": 2.0}


def test_the_versions_of_training_are_logged_and_evaluations_are_not() -> None:
    for version, logged in ((7, {"rollout/weight_version": 7.0}), (1_763_740_000_000, {})):
        assert service_log.rates({}, service_log.read(f"ctrl_rollout_weight_version {version}\n"), 2.0) == logged
