"""Suites: what a file means, what members share, failures and continuation; and a very small suite that really runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from process_table import processes_of

from ctrl_hpc import cli, jsonl, pipeline
from ctrl_hpc.config import ROOT, Config
from ctrl_hpc.experiments import suite
from ctrl_hpc.run import directory
from ctrl_hpc.run.journal import Journal, lines
from ctrl_hpc.tracking import marks

TINY = str(ROOT / "configs" / "tiny_ci.yaml")


def write(folder: Path, text: str) -> Path:
    """A suite's file."""
    file = folder / "suite.yaml"
    file.write_text(text)
    return file


def test_every_suite_of_the_project_is_right() -> None:
    for file in sorted((ROOT / "configs" / "suite").glob("*.yaml")):
        read = suite.read(file)
        assert suite.members(read, file), file
    names = [variant.name for variant in suite.read(ROOT / "configs" / "suite" / "tiny_ablation.yaml").variants]
    assert names == ["grpo", "dr_grpo", "rloo", "ppo", "verdict_reward", "sequence_ratio"]


def test_members_by_seed_with_their_overrides(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        f"name: x\nconfig: {TINY}\nfolder: {tmp_path}\nseeds: [3, 1]\noverrides: [rl.steps=7]\nvariants:\n"
        "  - {name: a}\n  - {name: b, overrides: [rl.steps=9], seeds: [2]}\n",
    )
    every = suite.members(suite.read(file), file, ["eval.turns=1"])
    assert [member.folder.name for member in every] == ["a-seed1", "b-seed2", "a-seed3"]
    assert [member.config.rl.steps for member in every] == [7, 9, 7]
    assert {member.config.eval.turns for member in every} == {1}
    assert {member.config.wandb.group for member in every} == {"x"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\nvariants: []\n", "variants: none"),
        ("name: x\nvariants: [{name: a, sed: 1}]\n", "variants[0].sed: unknown field; allowed: config, name, note"),
        ("name: x\nvariants: [{name: a}, {name: a}]\n", "'a' is not allowed; names are given once"),
        ("name: x\nvariants: [{name: a}]\n", "variants: a: config: missing"),
        (
            f"name: x\nconfig: {TINY}\nvariants: [{{name: a, overrides: [rl.stepss=1]}}]\n",
            "variants: a: override: rl.stepss",
        ),
        ("name: [\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["suite", str(write(tmp_path, text)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def fake_run(done: list[str]) -> Any:
    """A pipeline that marks every stage done, with a record of each, and fails for the variant ``bad``."""

    def run(config: Config) -> Path:
        folder = Path(config.run_dir or "")
        if folder.name.startswith("bad"):
            raise ValueError("the reward would not be honest")
        for stage in config.stages:
            if not directory.is_done(folder, stage):
                done.append(f"{folder.name} {stage}")
                jsonl.write_text(folder / stage / "records.jsonl", f"{stage} of {folder.name}\n")
                directory.mark_done(folder, stage, 1.0)
        jsonl.write_text(folder / "problems" / "train.jsonl", "problems\n")
        jsonl.write_text(folder / "eval" / "tiny" / "drafts.jsonl", f"drafts of {folder.name}\n")
        for critic in ("sft", "rl"):
            jsonl.write_text(folder / "eval" / "tiny" / critic / "turn_1.jsonl", f"{critic} of {folder.name}\n")
        return folder

    return run


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the fake pipeline has done, and no report."""
    out: list[str] = []
    monkeypatch.setattr(pipeline, "run", fake_run(out))
    monkeypatch.setattr("ctrl_hpc.report.combined.write", lambda folders, place, title: {})
    return out


@pytest.mark.slow
def test_variants_of_a_seed_share_what_they_begin_with(tmp_path: Path, done: list[str]) -> None:
    file = write(
        tmp_path,
        f"name: x\nconfig: {TINY}\nfolder: {tmp_path / 'runs'}\nseeds: [0, 1]\nvariants:\n"
        "  - {name: a}\n  - {name: b, overrides: [rl.steps=7]}\n  - {name: c, overrides: [sft.epochs=1]}\n",
    )
    suite.run(file)
    own = {
        name: [line.split()[1] for line in done if line.startswith(name)] for name in ("a-seed0", "b-seed0", "c-seed0")
    }
    assert own["a-seed0"] == ["sample", "synthesize", "sft", "rl", "eval", "report"]
    assert own["b-seed0"] == ["rl", "eval", "report"]
    assert own["c-seed0"] == ["sft", "rl", "eval", "report"]
    assert "a-seed1 sample" in done
    b = tmp_path / "runs" / "b-seed0"
    assert (b / "sft" / "records.jsonl").read_text() == "sft of a-seed0\n"
    assert (b / "problems" / "train.jsonl").read_text() == "problems\n"


def test_the_evaluation_of_untrained_critics_is_shared(tmp_path: Path, done: list[str]) -> None:
    file = write(
        tmp_path,
        f"name: x\nconfig: {TINY}\nfolder: {tmp_path / 'runs'}\nvariants:\n"
        "  - {name: a}\n  - {name: b, overrides: [rl.steps=7]}\n",
    )
    a, b = suite.members(suite.read(file), file)
    suite._run_member(a, [a, b])
    directory.prepare(b.config)
    suite.take_over(a.folder, b.folder, "sft")
    suite._share_evaluation(b, [a, b])
    tiny = b.folder / "eval" / "tiny"
    assert (tiny / "drafts.jsonl").read_text() == "drafts of a-seed0\n"
    assert (tiny / "sft" / "turn_1.jsonl").read_text() == "sft of a-seed0\n"
    assert not (tiny / "rl").exists()


def test_the_journal_of_a_stage_that_is_taken_over_is_told_by_its_own_run(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a / "problems", b):
        folder.mkdir(parents=True)
    for step in range(3):
        Journal(a, "sft").log(step, {"sft/loss": 1.0})
    suite.take_over(a, b, "sft")
    file = b / "sft" / "metrics.jsonl"
    assert [line["step"] for line in lines(file)] == [0, 1, 2]
    assert marks.mark(file, marks.run_id(b, "sft")).told == 2


def test_a_failure_stops_no_other_and_the_same_command_goes_on(
    tmp_path: Path, done: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path,
        f"name: x\nconfig: {TINY}\nfolder: {tmp_path / 'runs'}\nvariants: [{{name: bad}}, {{name: good}}]\n",
    )
    assert cli.main(["suite", str(file)]) == 1
    assert "1 of 2 runs failed: bad-seed0; the same command goes on" in capsys.readouterr().err
    first = len(done)
    assert cli.main(["suite", str(file), "--only", "good"]) == 0
    assert len(done) == first
    assert cli.main(["suite", str(file), "--only", "god"]) == 2
    assert "'god' is not a variant; allowed: bad, good" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_very_small_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two variants of one seed with every key of the reward, really run; a second start does nothing again."""
    small = [
        "rl.steps=2",
        "data.n_train=48",
        "data.n_eval=24",
        "synthesize.n_critiques=40",
        "eval.critics=[none,sft,rl]",
    ]
    small += ["eval.turns=1", "eval.greedy=false", "wandb.mode=disabled", "tiny.require_conditions=false"]
    small += ["trainer.ranks_per_node=1", "parallel.tensor=1"]
    shaped = "rl.transition_reward={fix: 1.0, keep: 1.0, break: -1.0, stuck: 0.0}"
    file = write(
        tmp_path,
        f"name: small\nconfig: {TINY}\nfolder: {tmp_path / 'runs'}\noverrides: {json.dumps(small)}\n"
        "variants:\n  - {name: grpo}\n"
        f"  - name: shaped\n    overrides: ['{shaped}', rl.verdict_only_share=0.25, rl.leak_penalty=0.5]\n",
    )
    assert cli.main(["suite", str(file)]) == 0
    told = capfd.readouterr().err
    assert "sft: taken over from grpo-seed0" in told
    assert "eval: drafts and untrained critics taken over from grpo-seed0" in told
    results = json.loads((tmp_path / "runs" / "report" / "results.json").read_text())
    assert set(results["variants"]) == {"grpo", "shaped"}
    one, other = (results["variants"][name]["datasets"]["tiny"]["critics"] for name in ("grpo", "shaped"))
    assert one["sft"]["pass_at_1"] == other["sft"]["pass_at_1"]
    folder = tmp_path / "runs" / "shaped-seed0"
    lines = gzip.decompress((folder / "rl" / "rollouts" / "step-000000.jsonl.gz").read_bytes()).splitlines()
    rollouts = [json.loads(line) for line in lines]
    alone = [item for item in rollouts if item["reason"].startswith("verdict_")]
    assert {item["kept"] for item in alone} == {True}
    assert 0 < len({item["solution_id"] for item in alone}) <= 8
    assert {item["reward"] for item in rollouts} <= {-1.0, 0.0, 1.0, -0.5, 0.5, -1.5}
    before = (tmp_path / "runs" / "shaped-seed0" / "report" / "results.json").read_bytes()
    assert cli.main(["suite", str(file)]) == 0
    assert (tmp_path / "runs" / "shaped-seed0" / "report" / "results.json").read_bytes() == before
    assert processes_of(tmp_path / "runs") == []
