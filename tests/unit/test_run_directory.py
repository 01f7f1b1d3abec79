"""A run directory belongs to one configuration, and interrupted stages are known."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.run import directory, driver_log
from ctrl_hpc.run import directory as fingerprints

TINY = ROOT / "configs" / "tiny.yaml"


def test_the_same_configuration_comes_back_and_another_is_refused(tmp_path: Path) -> None:
    config = load(TINY, [f"run_dir={tmp_path / 'run'}"])
    folder = directory.prepare(config)
    assert load(folder / "config.yaml") == config
    assert directory.prepare(config) == folder
    directory.mark_done(folder, "rl", 1.0)
    before = (folder / "config.yaml").read_bytes()
    other = load(TINY, [f"run_dir={tmp_path / 'run'}", "rl.steps=3"])
    told = r"belongs to another configuration: rl.steps is 100 there and 3 now, and rl is done with it"
    with pytest.raises(ValueError, match=told):
        directory.prepare(other)
    assert (folder / "config.yaml").read_bytes() == before


def test_what_no_stage_with_records_has_read_may_change(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}"]
    folder = directory.prepare(load(TINY, base))
    directory.mark_done(folder, "sample", 1.0)
    directory.mark_done(folder, "synthesize", 1.0)
    later = [*base, "rl.steps=3", "sft.epochs=1", "eval.critics=[none]", "data.n_eval=5", "name=b"]
    assert load(directory.prepare(load(TINY, later)) / "config.yaml") == load(TINY, later)
    for wrong, told in {
        "sample.n_samples=2": "sample.n_samples is 1 there and 2 now, and sample is done",
        "synthesize.balance=false": "synthesize.balance is True there and False now, and synthesize is done",
        "seed=1": "seed is 0 there and 1 now, and sample is done",
    }.items():
        with pytest.raises(ValueError, match=told):
            directory.check(load(TINY, [*later, wrong]))
    (folder / "rl" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"rl\.steps is 3 there and 4 now, and rl has begun with it"):
        directory.check(load(TINY, [*later, "rl.steps=4"]))
    with pytest.raises(ValueError, match=r"sft\.epochs is 1 there and 2 now, and rl has begun with it"):
        directory.check(load(TINY, [*later, "sft.epochs=2"]))  # its records are read by rl
    directory.check(load(TINY, [*later, "eval.turns=1", "tiny.require_conditions=false"]))


def test_benchmarks_matter_to_training_problems_that_are_kept_apart_from_them(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}", "data.name=taco"]
    folder = directory.prepare(load(TINY, base))
    directory.mark_done(folder, "sample", 1.0)
    directory.check(load(TINY, [*base, "data.n_eval=5"]))
    with pytest.raises(ValueError, match=r"is \['tiny'\] there and \['humaneval'\] now, and sample is done"):
        directory.check(load(TINY, [*base, "data.eval_names=[humaneval]"]))


def test_problems_of_another_configuration_are_made_anew(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}"]
    problems = directory.prepare(load(TINY, base)) / "problems"
    problems.mkdir()
    for name in ("train.jsonl", "train-original.jsonl", "decontamination.json", "eval-tiny.jsonl"):
        (problems / name).write_text("")
    directory.prepare(load(TINY, [*base, "rl.steps=1"]))
    assert len(list(problems.iterdir())) == 4
    directory.prepare(load(TINY, [*base, "data.n_eval=5"]))
    assert sorted(file.name for file in problems.glob("*.jsonl")) == ["train-original.jsonl", "train.jsonl"]
    directory.prepare(load(TINY, [*base, "data.n_eval=5", "data.n_train=5"]))
    assert list(problems.iterdir()) == []


def test_what_is_told_of_the_problems_goes_with_them(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}"]
    problems = directory.prepare(load(TINY, base)) / "problems"
    problems.mkdir()
    told = ("judgebench.jsonl", "ledger.json", "ledger.json.part", "left-out-tiny.json", "left-out.json")
    kept = {
        "data.n_train=7": ("judgebench.jsonl", "left-out-tiny.json"),
        "data.n_eval=7": ("judgebench.jsonl", "ledger.json", "ledger.json.part", "left-out.json"),
        "judge.split=claude": told[1:],
        "executor.limits.cpu_s=3": ("judgebench.jsonl", "left-out-tiny.json", "left-out.json"),
    }
    for change, names in kept.items():
        for name in told:
            (problems / name).touch()
        directory.prepare(load(TINY, [*base, change]))
        assert tuple(sorted(file.name for file in problems.iterdir())) == names, change
        directory.prepare(load(TINY, base))


def test_models_and_the_run_itself_may_move_but_not_change(tmp_path: Path) -> None:
    models, judge = tmp_path / "checkout" / "models", tmp_path / "checkout" / "judge.py"
    models.mkdir(parents=True)
    (models / "model.safetensors").write_bytes(b"weights")
    judge.write_text("def close(a, b): return a == b\ndef exact(a, b): return a == b\n")

    def asked(checkout: Path, run: Path, function: str = "close") -> Config:
        judges = f"executor.judges={{mine: {checkout / 'judge.py'}:{function}}}"
        return load(TINY, [f"run_dir={run}", f"generator={checkout / 'models'}", judges])

    directory.mark_done(directory.prepare(asked(tmp_path / "checkout", tmp_path / "run")), "sample", 1.0)
    (tmp_path / "checkout").rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "moved-run")
    moved = asked(tmp_path / "moved", tmp_path / "moved-run")
    assert load(directory.prepare(moved) / "config.yaml") == moved
    with pytest.raises(ValueError, match=r"executor\.judges\.mine is .*close' there and .*exact' now"):
        directory.check(asked(tmp_path / "moved", tmp_path / "moved-run", "exact"))
    (tmp_path / "moved").rename(tmp_path / "again")
    (tmp_path / "again" / "models" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ValueError, match=r"generator is .*moved/models' there and .*again/models' now"):
        directory.check(asked(tmp_path / "again", tmp_path / "moved-run"))


def test_large_files_are_told_by_size_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE", 8)
    monkeypatch.setattr(fingerprints, "_END", 2)
    file = tmp_path / "weights"
    told = {}
    for content in (
        b"abcdefghij",
        b"abcDefghij",
        b"abcdefghijk",
        b"abcdefghiX",
        b"Xbcdefghij",
        b"abcdefgh",
        b"abcDefgh",
    ):
        file.write_bytes(content)
        told[content] = fingerprints.fingerprint(file)
    assert told[b"abcdefghij"] == told[b"abcDefghij"] and len(set(told.values())) == 6
    assert fingerprints.fingerprint(tmp_path / "nothing") is None
    (tmp_path / "a").mkdir()
    file.rename(tmp_path / "a" / "weights")
    one = fingerprints.fingerprint(tmp_path / "a")
    (tmp_path / "a" / "weights").rename(tmp_path / "a" / "weight")
    assert fingerprints.fingerprint(tmp_path / "a") != one


def test_where_a_run_runs_may_change(tmp_path: Path) -> None:
    config = load(TINY, [f"run_dir={tmp_path / 'run'}"])
    directory.prepare(config)
    moved = replace(config, launch=replace(config.launch, account="physics"), stages=("report",))
    assert load(directory.prepare(moved) / "config.yaml") == moved
    kept = replace(moved, launch=replace(moved.launch, snapshot="keep"))
    assert load(directory.prepare(kept) / "config.yaml") == moved  # keep is said of one start


def test_the_trainers_layout_may_change_but_not_the_format_of_its_optimizer(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}"]
    directory.mark_done(directory.prepare(load(TINY, base)), "sft", 1.0)
    wider = [*base, "trainer.nodes=2", "parallel.tensor=4", "parallel.sequence=true", "trainer.micro_batch_tokens=512"]
    folder = directory.prepare(load(TINY, wider))
    assert load(folder / "config.yaml").parallel.tensor == 4
    with pytest.raises(ValueError, match=r"parallel\.distributed_optimizer is False there and True now"):
        directory.check(load(TINY, [*wider, "parallel.distributed_optimizer=true"]))


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a run directory and not empty"):
        directory.prepare(load(TINY, [f"run_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_stages_are_done_only_when_marked_and_attempts_add_up(tmp_path: Path) -> None:
    assert not directory.is_done(tmp_path, "rl")
    directory.add_attempt(tmp_path, "rl", 1.5)
    directory.add_attempt(tmp_path, "rl", 2.0)
    assert directory.spent_before(tmp_path, "rl") == 3.5
    directory.mark_done(tmp_path, "rl", 4.0)
    assert directory.is_done(tmp_path, "rl")


def test_an_input_whose_content_changed_is_refused_or_done_anew(
    tmp_path: Path,
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("one\n")
    words = [f"run_dir={tmp_path / 'run'}", "data.name=jsonl", f"data.path={problems}"]
    config = load(TINY, words)
    folder = directory.prepare(config)
    (folder / "problems").mkdir()
    (folder / "problems" / "train.jsonl").write_text("made of one\n")
    problems.write_text("two\n")
    directory.prepare(config)  # no stage has records: made anew
    assert not (folder / "problems" / "train.jsonl").exists()
    directory.mark_done(folder, "sample", 1.0)
    directory.mark_done(folder, "synthesize", 1.0)
    directory.check(config)
    problems.write_text("three\n")
    told = rf"data\.path: the content of {problems} has changed, and sample is done with it; .* with --redo sample$"
    with pytest.raises(ValueError, match=told):
        directory.check(config)
    moves = directory.put_aside(folder, "sample")
    assert [aside for _, aside in moves] == [folder / "earlier" / "1" / name for name in ("sample", "synthesize")]
    directory.check(config)
    directory.put_back(moves)
    assert directory.is_done(folder, "synthesize") and not list((folder / "earlier").iterdir())


def test_redo_leaves_a_run_as_it_was_when_nothing_can_be_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "tiny", f"run_dir={tmp_path / 'run'}"]
    folder = directory.prepare(load("tiny", words[2:]))
    directory.mark_done(folder, "rl", 1.0)
    assert cli.main([*words, "--redo", "rl", "--dry-run"]) == 2
    assert cli.main([*words, "--redo", "sft"]) == 2
    assert f"--redo: sft: {folder} holds nothing of it" in capsys.readouterr().err
    assert cli.main([*words, "--redo", "rl", "launch.bind=192.0.2.1"]) == 2
    assert "launch.bind: 192.0.2.1" in capsys.readouterr().err
    assert directory.is_done(folder, "rl") and not list((folder / "earlier").iterdir())


def test_what_a_driver_prints_is_kept_without_bars_and_colours(tmp_path: Path) -> None:
    code = (
        "import sys; from rich.console import Console; from ctrl_hpc.run.driver_log import kept\n"
        f"with kept({str(tmp_path)!r}):\n"
        "    Console(stderr=True, force_terminal=True).print('[red]sample[/red]: done')\n"
        "    print('steps ━━━━ 3/5'); print('report: here')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\x1b[" in done.stderr and done.stdout == "steps ━━━━ 3/5\nreport: here\nafter\n"
    log = tmp_path / "logs" / "driver.log"
    assert log.read_text() == "sample: done\nreport: here\n"
    with open(log, "a") as out:  # a driver that was started with its output there writes once
        subprocess.run([sys.executable, "-c", code], stdout=out, stderr=out, check=True)
    assert log.read_text().count("report: here") == 2


def test_a_stage_is_put_aside_to_be_done_again_with_other_settings(tmp_path: Path) -> None:
    base = [f"run_dir={tmp_path / 'run'}"]
    folder = directory.prepare(load(TINY, base))
    for stage in ("sample", "synthesize", "sft"):
        directory.mark_done(folder, stage, 1.0)
    other = load(TINY, [*base, "prompts.critique_close='Overall judgment:'", "synthesize.balance=false"])
    with pytest.raises(ValueError, match="and synthesize is done"):
        directory.check(other)
    directory.put_aside(folder, "synthesize")
    assert (folder / "earlier" / "1" / "synthesize" / "done.json").exists()
    assert not directory.is_done(folder, "sft")  # it had read the records
    directory.prepare(other)  # the drafts do not depend on how critiques are closed
    assert directory.is_done(folder, "sample")
    directory.mark_done(folder, "synthesize", 1.0)
    directory.put_aside(folder, "synthesize")
    assert (folder / "earlier" / "2" / "synthesize" / "done.json").exists()


def test_a_forced_close_needs_room() -> None:
    with pytest.raises(ValueError, match=r"rl\.max_tokens: 32 leaves no room for prompts\.critique_close"):
        load(TINY, ["prompts.critique_close=x", "rl.max_tokens=32"])


@pytest.mark.parametrize("goes_there", [False, True])
def test_a_full_disk_under_what_a_driver_prints_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_there: bool
) -> None:
    (tmp_path / "logs").mkdir()
    if goes_there:
        (tmp_path / "logs" / "driver.log").symlink_to("/dev/full")
    full = open("/dev/full", "w")  # noqa: SIM115 - every write to it finds no space, the last one too
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", full)
    with driver_log.kept(tmp_path):
        for stream in (sys.stdout, sys.stderr):
            print("x" * 100_000, file=stream, flush=True)
    with pytest.raises(OSError, match="No space left"):
        full.flush()
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
