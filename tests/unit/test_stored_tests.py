"""Tests by reference: a problem names them, they lie once in a store, and nobody reads them who needs none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ctrl_hpc import jsonl
from ctrl_hpc.data import problems as problems_of
from ctrl_hpc.data.taco import load as load_taco
from ctrl_hpc.flow.text import asked_for
from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, Problem, StdinTest, StoredTests, TestCase
from ctrl_hpc.store.tests import TestStore, folder_of

TESTS = (
    StdinTest(stdin="1\n", expected_stdout="2\ud800"),
    FunctionTest(name="f", args=((1, 2), {3: "x"}), expected={4}),
    AssertTest(code="assert g(1) == 2"),
)
PROBLEM = Problem(id="p", source="s", split="train", prompt="Write f.", tests=TESTS)


def test_a_file_of_problems_names_tests_that_lie_once_in_the_run_s_store(tmp_path: Path) -> None:
    file = tmp_path / "problems" / "train.jsonl"
    with problems_of.store(tmp_path) as tests:
        problems_of.write(file, [PROBLEM, dataclasses.replace(PROBLEM, id="q")], tests)
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["tests"] == second["tests"] and first["tests"].keys() == {"sha256", "total", "names"}
    assert (first["tests"]["total"], first["tests"]["names"]) == (3, ["f", "g"])
    assert sum(index.stat().st_size for index in folder_of(tmp_path).glob("*.idx")) == 32
    found = list(problems_of.read(file))
    assert [tuple(problem.tests) for problem in found] == [TESTS, TESTS]
    assert len(found[0].tests) == 3 and found[0].tests[1] == TESTS[1] and found[0] == PROBLEM


def test_without_the_store_all_but_the_tests_is_known(tmp_path: Path) -> None:
    file = tmp_path / "problems" / "train.jsonl"
    problems_of.write(file, [PROBLEM], problems_of.store(tmp_path))
    for index in folder_of(tmp_path).iterdir():
        index.unlink()
    (found,) = problems_of.read(file)
    assert (found.prompt, len(found.tests), asked_for(found)) == ("Write f.", 3, asked_for(PROBLEM))
    with pytest.raises(ValueError, match=r"are not in .*tests"):
        list(found.tests)
    with pytest.raises(ValueError, match="lie in a store that is not known here"):
        list(jsonl.read(Problem, file)[0].tests)


def test_lists_of_tests_stay_lists(tmp_path: Path) -> None:
    file = tmp_path / "problems" / "train.jsonl"
    jsonl.write(file, [PROBLEM])
    (found,) = problems_of.read(file)
    assert found.tests == TESTS and jsonl.line(found) == jsonl.line(PROBLEM)


@pytest.mark.parametrize("tests", [{}, {"sha256": "ab", "total": 1, "names": []}, {"sha256": "a" * 64, "total": "1"}])
def test_what_is_no_name_of_tests_is_refused(tests: object) -> None:
    with pytest.raises(ValueError, match="tests: expected a list of tests, or the sha256, total and names"):
        jsonl.decode(Problem, jsonl.encode(PROBLEM) | {"tests": tests})


def test_tests_are_copied_to_the_first_store_and_to_another(tmp_path: Path) -> None:
    with TestStore(tmp_path / "shared") as shared:
        kept = shared.keep(PROBLEM, ["f"])
        assert isinstance(kept.tests, StoredTests)
        assert shared.keep(kept, []) is kept
        with TestStore(tmp_path / "node", tmp_path / "shared") as node:
            assert kept.tests.sha256 in node and node.load(kept.tests.sha256) == TESTS
        with TestStore(tmp_path / "node") as node, TestStore(tmp_path / "run") as run:
            assert node.load(kept.tests.sha256) == TESTS
            again = run.keep(kept, [])
            assert isinstance(again.tests, StoredTests) and again.tests.names == ("f",)
            assert run.load(kept.tests.sha256) == TESTS


def content(stdin: str, stdout: str) -> bytes:
    return jsonl.content((StdinTest(stdin=stdin, expected_stdout=stdout),), tuple[TestCase, ...])


def test_a_store_without_a_folder_is_memory() -> None:
    store = TestStore(memory_bytes=10_000)
    names = [store.add(content(str(n) * 900, "")) for n in range(10)]
    assert store.load(names[-1])[0] == StdinTest(stdin="9" * 900, expected_stdout="")
    assert store.content(names[-1]) == content("9" * 900, "")
    many = [store.add(content(str(n) * 900, "1")) for n in range(20)]
    assert names[0] not in store and many[-1] in store


def test_what_was_changed_on_the_disk_is_not_taken(tmp_path: Path) -> None:
    with TestStore(tmp_path / "a") as one, TestStore(tmp_path / "b") as other:
        sha256, wrong = one.add(b"[]"), other.add(b"[1]")
        one._stores[0].put(bytes.fromhex(wrong)[:16], one._stores[0].get(bytes.fromhex(sha256)[:16]) or b"")
        with pytest.raises(ValueError, match="are not in"):
            one.load(wrong)


def test_executions_name_tests_too(tmp_path: Path) -> None:
    with TestStore(tmp_path) as store:
        run = Execution(program="", tests=store.keep(PROBLEM, []).tests, limits=Limits())
        again = jsonl.decode(Execution, jsonl.encode(run))
        assert again == run and len(jsonl.line(run)) < 400


def test_a_data_set_is_read_without_holding_its_tests(tmp_path: Path) -> None:
    rows = [
        {"question": f"Add {n}.", "solutions": "[]", "input_output": json.dumps({"inputs": ["1"], "outputs": [str(n)]})}
        for n in range(5)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with TestStore(tmp_path / "tests") as store:
        seen: list[str] = []

        def keep(problem: Problem) -> Problem:
            seen.append(problem.id)
            return problems_of.kept(problem, store)

        found = load_taco(str(tmp_path / "train.jsonl"), "train", keep=keep)
        whole = load_taco(str(tmp_path / "train.jsonl"), "train")
        assert seen == [problem.id for problem in found.items] and found.items == whole.items
        assert all(isinstance(problem.tests, StoredTests) for problem in found.items)
