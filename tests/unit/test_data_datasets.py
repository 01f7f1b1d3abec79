"""Taking problems from a data set by name."""

from pathlib import Path

import pytest

from ctrl_hpc import jsonl
from ctrl_hpc.data import catalog
from ctrl_hpc.records import Problem, StdinTest


def _problem(identity: str, split: str = "train") -> Problem:
    tests = (StdinTest(stdin="", expected_stdout="1"),)
    return Problem(id=identity, source="ours", split=split, prompt="print 1", tests=tests)


def test_training_problems_are_drawn_by_seed_and_evaluation_problems_are_not() -> None:
    first = catalog.load("tiny", path=None, split="train", n=50, seed=1)
    assert first == catalog.load("tiny", path=None, split="train", n=50, seed=1)
    assert first != catalog.load("tiny", path=None, split="train", n=50, seed=2)
    test = catalog.load("tiny", path=None, split="test", n=50, seed=1)
    assert test == catalog.load("tiny", path=None, split="test", n=50, seed=2)
    assert not {problem.id for problem in first} & {problem.id for problem in test}


def test_our_own_schema_is_read_by_split(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    jsonl.write(file, [_problem("a"), _problem("b", "test"), _problem("c")])
    loaded = catalog.load("jsonl", path=str(file), split="train", n=10, seed=0)
    assert [problem.id for problem in loaded] == ["a", "c"]


@pytest.mark.parametrize(
    ("name", "path", "split", "told"),
    [
        ("tinny", None, "train", "'tinny' is not a data set; allowed: tiny"),
        ("tiny", None, "night", "tiny has no split 'night'; allowed: train, dev, test"),
        ("jsonl", None, "train", "data.path: missing"),
        ("jsonl", "nowhere.jsonl", "train", "no such file"),
        ("jsonl", "{file}", "dev", "no problem of the split 'dev'"),
    ],
)
def test_what_cannot_be_loaded_says_why(name: str, path: str | None, split: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    jsonl.write(file, [_problem("a"), _problem("a")])
    with pytest.raises(ValueError) as caught:
        catalog.load(name, path=path and path.format(file=file), split=split, n=10, seed=0)
    assert told in str(caught.value)
