"""A run directory belongs to one configuration, and interrupted stages are known."""

from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.run import directory
from ctrl_hpc.run import directory as fingerprints

TINY = ROOT / "configs" / "tiny.yaml"


def test_the_same_configuration_comes_back_and_another_is_refused(tmp_path: Path) -> None:
    config = load(TINY, [f"run_dir={tmp_path / 'run'}"])
    folder = directory.prepare(config)
    assert load(folder / "config.yaml") == config
    assert directory.prepare(config) == folder
    before = (folder / "config.yaml").read_bytes()
    other = load(TINY, [f"run_dir={tmp_path / 'run'}", "rl.steps=3"])
    with pytest.raises(ValueError, match=r"belongs to another configuration: rl.steps is 100 there and 3 now"):
        directory.prepare(other)
    assert (folder / "config.yaml").read_bytes() == before


def test_models_and_the_run_itself_may_move_but_not_change(tmp_path: Path) -> None:
    models, judge = tmp_path / "checkout" / "models", tmp_path / "checkout" / "judge.py"
    models.mkdir(parents=True)
    (models / "model.safetensors").write_bytes(b"weights")
    judge.write_text("def close(a, b): return a == b\ndef exact(a, b): return a == b\n")

    def asked(checkout: Path, run: Path, function: str = "close") -> Config:
        judges = f"executor.judges={{mine: {checkout / 'judge.py'}:{function}}}"
        return load(TINY, [f"run_dir={run}", f"generator={checkout / 'models'}", judges])

    directory.prepare(asked(tmp_path / "checkout", tmp_path / "run"))
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
    directory.prepare(load(TINY, base))
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
