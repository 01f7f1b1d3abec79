"""Records survive a file, and a broken line is named by file, line and field."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc import jsonl
from ctrl_hpc.records import AssertTest, Critique, FunctionTest, Problem, StdinTest, TestResult, Verdict

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=10,
)


@settings(derandomize=True, deadline=None)
@given(PLAIN)
def test_function_arguments_survive_json(value: object) -> None:
    text = json.dumps(jsonl.encode_plain(value))
    assert jsonl.decode_plain(json.loads(text)) == value


def test_a_problem_has_the_documented_form() -> None:
    problem = Problem(
        id="p1",
        source="ours",
        split="train",
        prompt="add",
        tests=(
            StdinTest(stdin="1 2", expected_stdout="3"),
            AssertTest(code="assert add(1, 2) == 3"),
            FunctionTest(name="add", args=(1, (2,)), expected=3),
        ),
        cpu_s=1.5,
    )
    assert json.loads(jsonl.line(problem)) == {
        "id": "p1",
        "source": "ours",
        "split": "train",
        "prompt": "add",
        "tests": [
            {"kind": "stdin", "stdin": "1 2", "stdout": "3"},
            {"kind": "assert", "code": "assert add(1, 2) == 3"},
            {"kind": "function", "name": "add", "args": [1, {"__tuple__": [2]}], "expected": 3},
        ],
        "cpu_s": 1.5,
    }
    assert jsonl.decode(Problem, json.loads(jsonl.line(problem))) == problem


def test_none_survives_where_the_field_has_no_default() -> None:
    critique = Critique(id="a#0", solution_id="a", text="?", judgement=None)
    assert "judgement" not in json.loads(jsonl.line(critique))
    assert jsonl.decode(Critique, json.loads(jsonl.line(critique))) == critique


def test_bytes_survive(tmp_path: Path) -> None:
    verdict = Verdict(status="wrong_answer", tests=(TestResult(status="wrong_answer", stdout=b"\xff\x00"),))
    jsonl.write(tmp_path / "v.jsonl", [verdict])
    assert jsonl.read(Verdict, tmp_path / "v.jsonl") == [verdict]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ('{"id": 1, "source": "s", "split": "train", "prompt": "", "tests": []}', "id: expected str, got int 1"),
        ('{"id": "a", "source": "s", "split": "train", "prompt": ""}', "tests: missing"),
        (
            '{"id": "a", "source": "s", "split": "train", "prompt": "", "tests": [{"kind": "x"}]}',
            "tests[0].kind: 'x' is not one of stdin, assert, function",
        ),
        (
            '{"id": "a", "source": "s", "split": "train", "prompt": "", "tests": [{"kind": "stdin", "stdin": ""}]}',
            "tests[0].stdout: missing",
        ),
        ('{"id": "a", "source": "s", "split": "train", "prompt": "", "tests": [], "z": 1}', "z: unknown field"),
    ],
)
def test_a_broken_line_is_named(line: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    good = '{"id": "a", "source": "s", "split": "train", "prompt": "", "tests": []}'
    file.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError) as caught:
        jsonl.read(Problem, file)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert told in str(caught.value)


def test_write_replaces_whole_files_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    jsonl.write(file, [Verdict(status="accepted")])

    def failing() -> object:
        yield Verdict(status="time_limit")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        jsonl.write(file, failing())
    assert jsonl.read(Verdict, file) == [Verdict(status="accepted")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
