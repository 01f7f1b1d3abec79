"""The stages end to end: deterministic, continued to the bit after any kill, with the right calls of the services."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import random_qwen
import torch
from megatron_jobs import spawn
from safetensors.torch import load_file

from ctrl_hpc import cli, jsonl
from ctrl_hpc.records import Critique, Generation, Problem, Solution, StdinTest, Verdict
from ctrl_hpc.rollout.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merged
from ctrl_hpc.run import journal
from ctrl_hpc.seeds import take

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 8


def write_inputs(run_dir: Path) -> None:
    """Problems, executed drafts and critiques, as the stages before leave them."""
    problems, solutions, critiques = [], [], []
    for number in range(7):
        tests = (StdinTest(stdin="1\n", expected_stdout="1\n"),)
        problems.append(Problem(id=f"p{number}", source="test", split="train", prompt=f"print {number}", tests=tests))
        verdict = Verdict(status="accepted" if number % 2 else "wrong_answer")
        program = f"print({number})"
        text = f"```python\n{program}\n```"
        solution = Solution(id=f"p{number}/0", problem_id=f"p{number}", text=text, program=program, verdict=verdict)
        solutions.append(solution)
        said = f"keep the sum; {number}\nOverall judgment: {'Correct' if number % 2 else 'Incorrect'}"
        generation = Generation(text=said) if number % 3 else None
        judgement = "correct" if number % 2 else "incorrect"
        critiques.append(
            Critique(
                id=f"p{number}/0#0",
                solution_id=solution.id,
                text=said,
                judgement=judgement,  # type: ignore[arg-type]
                generation=generation,
            )
        )
    jsonl.write(run_dir / "problems" / "train.jsonl", problems)
    jsonl.write(run_dir / "sample" / "solutions.jsonl", solutions)
    jsonl.write(run_dir / "synthesize" / "critiques.jsonl", critiques)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases have run."""
    place = tmp_path_factory.mktemp("stages")
    random_qwen.build(place / "critic")
    for name in (
        "whole",
        "again",
        "killed",
        "killed-anywhere",
        "live-0",
        "live-1",
        "chunks",
        "ahead",
        "ppo",
        "refill",
        "lora",
    ):
        write_inputs(place / name)
    for name in ("live-0", "live-1", "chunks", "ahead", "ppo", "refill"):
        shutil.copytree(place / "critic", place / name / "sft" / "hf")
    spawn("stages", "main", place)
    return place


@pytest.fixture(scope="module")
def status(folder: Path) -> dict[str, Any]:
    """How each case's process ended."""
    return json.loads((folder / "stages.json").read_text())


def log_of(folder: Path) -> str:
    return (folder / "stages.log").read_text()[-4000:]


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    """The numbers of the stage's journal without the times."""
    lines = journal.lines(journal.place(folder, stage))
    numbers = [{"step": line["step"], **journal.numbers(line)} for line in lines]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in numbers]


def test_the_same_seed_and_layout_give_the_same_bits_with_saves_in_the_background_too(
    folder: Path, status: dict[str, Any]
) -> None:
    assert (status["whole"], status["again"]) == (0, 0), log_of(folder)
    for stage in ("sft", "rl"):
        assert metrics(folder / "whole", stage) == metrics(folder / "again", stage)
        first, second = (load_file(folder / run / stage / "hf" / "model.safetensors") for run in ("whole", "again"))
        assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(("kills", "run"), [("kills", "killed"), ("random_kills", "killed-anywhere")])
def test_a_trainer_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(
    folder: Path, status: dict[str, Any], kills: str, run: str
) -> None:
    assert status[kills] == [9] * 6, "each of these processes was to die by SIGKILL"
    assert status[run] == 0, log_of(folder)
    for stage in ("sft", "rl"):
        whole, killed = (load_file(folder / name / stage / "hf" / "model.safetensors") for name in ("whole", run))
        assert all(whole[name].equal(killed[name]) for name in whole)
        assert metrics(folder / run, stage) == metrics(folder / "whole", stage)
    assert [record["step"] for record in metrics(folder / run, "rl")] == list(range(STEPS))


def test_training_changed_the_critic(folder: Path, status: dict[str, Any]) -> None:
    base = load_file(folder / "critic" / "model.safetensors")
    sft, rl = (load_file(folder / "whole" / stage / "hf" / "model.safetensors") for stage in ("sft", "rl"))
    for name in base:
        assert not base[name].equal(sft[name]) and not sft[name].equal(rl[name]), name


def test_an_export_is_a_whole_hugging_face_folder(folder: Path, status: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("sft", "rl"):
        exported = folder / "whole" / stage / "hf"
        assert AutoModelForCausalLM.from_pretrained(exported).config.model_type == "qwen2"
        assert AutoTokenizer.from_pretrained(exported).chat_template == random_qwen.CHAT_TEMPLATE


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_services_are_called_as_the_method_says(folder: Path, status: dict[str, Any], staleness: int) -> None:
    run_dir = folder / f"live-{staleness}"
    assert status[f"live-{staleness}"] == 0, log_of(folder)
    told = json.loads((run_dir / "services.json").read_text())
    loaded = {0: [0, 1, 2], 1: [0, 0, 1]}[staleness]
    assert told["published"] == [[f"v{version:06d}", version, True] for version in loaded]
    kept = range(loaded[-1], 4)
    assert sorted(path.name for path in (run_dir / "rl" / "weights").iterdir()) == [f"v{at:06d}" for at in kept]
    records = metrics(run_dir, "rl")
    for name in ("rl/staleness", "rl/staleness_mean"):
        assert [record[name] for record in records] == [0.0, float(staleness), float(staleness)]
    for record in records:  # half of a group judges Correct and keeps a draft, half gets a wrong revision
        assert record["rl/judged_correct"] == 0.5
        assert record["executor/runs"] == 4
        assert record["rl/reward"] == record["rl/draft_pass_rate"] / 2
    files = sorted((run_dir / "rl" / "rollouts").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.jsonl.gz" for step in range(3)]
    lines = [json.loads(line) for line in gzip.decompress(files[0].read_bytes()).splitlines()]
    assert len(lines) == 16 and lines[1]["kept"] and lines[0]["status"] == "wrong_answer"
    assert lines[0]["token_ids"] == [10, 20, 30] and lines[0]["version"] == 0
    # Seven drafts, four a step: two passes over the pool take each draft twice before any comes a third time.
    drawn = told["drawn"]
    assert len(drawn) == 12 and len(set(drawn[:7])) == 7


def test_chunks_of_a_step_give_the_bits_of_the_whole_step(folder: Path, status: dict[str, Any]) -> None:
    assert status["chunks"] == 0, log_of(folder)
    whole, chunks = folder / "live-1", folder / "chunks"
    for step in range(3):
        name = f"rl/rollouts/step-{step:06d}.jsonl.gz"
        assert (chunks / name).read_bytes() == (whole / name).read_bytes()
    first, second = (load_file(run / "rl" / "hf" / "model.safetensors") for run in (whole, chunks))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_trainer_stopped_with_rollouts_ahead_continues_with_every_step_once(
    folder: Path, status: dict[str, Any]
) -> None:
    assert os.waitstatus_to_exitcode(status["stopped"]) != 0 and status["ahead"] == 0, log_of(folder)
    run_dir = folder / "ahead"
    records = metrics(run_dir, "rl")
    assert [record["step"] for record in records] == list(range(6))
    stale = [record["rl/staleness"] for record in records]
    assert [stale[step] for step in (0, 1, 3, 4)] == [0, 1, 0, 1], "the second start continues with version 3"
    assert {stale[2], stale[5]} <= {1, 2}
    drawn = take(7, seed=0, start=0, count=24)
    for step in range(6):
        lines = gzip.decompress((run_dir / "rl" / "rollouts" / f"step-{step:06d}.jsonl.gz").read_bytes()).splitlines()
        drafts = [json.loads(line)["solution_id"] for line in lines[::4]]
        solutions = [f"p{number}/0" for number in drawn[4 * step : 4 * step + 4]]
        assert sorted(drafts) == sorted(dict.fromkeys(solutions))
    kept = sorted(int(path.name[1:]) for path in (run_dir / "rl" / "weights").iterdir())
    assert kept == list(range(kept[0], 7)) and len(kept) <= 4


def test_drafts_without_spread_are_replaced_within_a_bound(folder: Path, status: dict[str, Any]) -> None:
    assert status["refill"] == 0, log_of(folder)
    records = metrics(folder / "refill", "rl")
    position, drawn = 0, 0
    for record in records:
        used: set[int] = set()
        for _ in range(3):  # a round, and two more to replace
            missing = 4 - sum(draft % 2 for draft in used)  # critiques of an accepted draft differ in what they earn
            used |= set(take(7, seed=0, start=position, count=missing))
            position += missing
        drawn += len(used)
        assert record["rl/groups"] == sum(draft % 2 for draft in used)
        assert 1 <= record["rl/refills"] <= 2, "three of the seven can be learnt from, four are wanted"
        assert record["rl/skipped_groups"] == sum(draft % 2 == 0 for draft in used)
    assert len(json.loads((folder / "refill" / "services.json").read_text())["drawn"]) == drawn


def test_a_checkpoint_converts_to_the_weights_that_the_stage_exported(
    folder: Path, status: dict[str, Any], tmp_path: Path
) -> None:
    newest = max((folder / "whole" / "rl" / "checkpoints").iterdir())
    assert cli.main(["convert", "megatron-to-hf", str(newest), str(tmp_path / "hf")]) == 0
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    exported = load_file(folder / "whole" / "rl" / "hf" / "model.safetensors")
    assert converted.keys() == exported.keys() and all(converted[name].equal(exported[name]) for name in exported)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_every_log_names_the_kernels_backend(folder: Path, status: dict[str, Any]) -> None:
    assert (
        "rl: from step 0 of 8; kernels torch, layers torch, dtype float32, device cpu"
        in (folder / "stages.log").read_text()
    )
    assert all(record["kernels/triton"] == 0 for record in metrics(folder / "whole", "rl"))
    first = journal.lines(journal.place(folder / "whole", "rl"))[0]
    assert first["summary"]["trainer/kernels"] == "torch"


def test_ppo_trains_a_value_network_beside_the_critic(folder: Path, status: dict[str, Any]) -> None:
    assert status["ppo"] == 0, log_of(folder)
    records = metrics(folder / "ppo", "rl")
    assert len(records) == 3
    assert len({record["rl/value"] for record in records}) == 3, "the values move with every update"
    assert all(record["rl/groups"] == 4 and record["rl/value_loss"] > 0 for record in records)


def test_with_adapters_the_stages_publish_them_alone_and_end_with_both_kinds_of_folder(
    folder: Path, status: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status["lora"] == 0, log_of(folder)
    run_dir = folder / "lora"
    published = sorted((run_dir / "rl" / "weights").iterdir())[-1]
    assert {file.name for file in published.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    for stage, base in (("sft", folder / "critic"), ("rl", run_dir / "sft" / "hf")):
        whole, before = (load_file(place / "model.safetensors") for place in (run_dir / stage / "hf", base))
        served = merged(run_dir / stage / "adapters")
        assert all(torch.allclose(served[name], whole[name], rtol=0, atol=1e-6) for name in whole)
        changed = {name for name in whole if not torch.equal(whole[name], before[name])}
        assert changed == {name for name in whole if "_proj.weight" in name}
    checkpoint = sorted((run_dir / "rl" / "checkpoints").iterdir())[-1]
    assert cli.main(["convert", "megatron-to-hf", str(checkpoint), str(folder / "never")]) == 2
    assert "holds adapters alone" in capsys.readouterr().err
