"""Records survive a file, and a broken line is named by file, line and field."""

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc import jsonl
from ctrl_hpc.evaluate.tree import Node
from ctrl_hpc.records import (
    AssertTest,
    Critique,
    Execution,
    FunctionTest,
    Problem,
    Solution,
    StdinTest,
    TestResult,
    Verdict,
    decode_plain,
    encode_plain,
)
from ctrl_hpc.train.rollouts import Rollout

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
    text = json.dumps(encode_plain(value))
    assert decode_plain(json.loads(text)) == value


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


def test_none_is_written_where_it_is_a_value() -> None:
    test = FunctionTest(name="f", args=(None,), expected=None)
    assert jsonl.encode(test) == {"kind": "function", "name": "f", "args": (None,), "expected": None}
    assert jsonl.decode(FunctionTest, jsonl.encode(test)) == test


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


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"cpu_s": "1"}, "tests[0].cpu_s: expected float, got str '1'"),
        ({"cpu_s": True}, "tests[0].cpu_s: expected float, got bool True"),
        ({"exit_code": 1.0}, "tests[0].exit_code: expected int, got float 1.0"),
        ({"exit_code": True}, "tests[0].exit_code: expected int, got bool True"),
        ({"stdout": "x"}, "tests[0].stdout: expected base64 bytes, got str 'x'"),
        (
            {"stdout": {"base64": "x"}},
            "tests[0].stdout: Invalid base64-encoded string: ",
        ),
        ({"status": "fine"}, "tests[0].status: 'fine' is not one of accepted, wrong_answer, "),
        ({"z": 1}, "tests[0].z: unknown field; allowed: cpu_s, exit_code, "),
        ("x", "tests[0]: expected an object, got str 'x'"),
    ],
)
def test_types_are_exact_in_lines_and_in_data(value: object, told: str, tmp_path: Path) -> None:
    base = {"status": "accepted"}
    data = {"status": "accepted", "tests": [{**base, **value} if isinstance(value, dict) else value]}
    (tmp_path / "v.jsonl").write_text(json.dumps(data))
    for read in (lambda: jsonl.decode(Verdict, data), lambda: jsonl.read(Verdict, tmp_path / "v.jsonl")):
        with pytest.raises(ValueError) as caught:
            read()
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_where_leads_to_the_field() -> None:
    with pytest.raises(ValueError, match=r"^executions\[3\]\.tests: expected a list, got int 1$"):
        jsonl.decode(Verdict, {"status": "accepted", "tests": 1}, "executions[3]")
    with pytest.raises(ValueError, match=r"^Verdict: expected an object, got list \[\]$"):
        jsonl.decode(Verdict, [])


LINES = Path(__file__).with_name("lines_as_of_8c4b07b")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("problems", Problem),
        ("executions", Execution),
        ("solutions", Solution),
        ("verdicts", Verdict),
        ("critiques", Critique),
        ("rollouts", Rollout),
        ("nodes", Node),
    ],
)
def test_lines_of_earlier_runs_are_read_and_written_the_same(name: str, record: type) -> None:
    text = (LINES / f"{name}.jsonl").read_text()
    records = jsonl.read(record, LINES / f"{name}.jsonl")
    assert "".join(map(jsonl.line, records)) == text
    assert [repr(jsonl.decode(record, json.loads(line))) for line in text.splitlines()] == list(map(repr, records))


def test_a_compressed_file_has_the_same_lines_and_equal_records_the_same_bytes(tmp_path: Path) -> None:
    records = jsonl.read(Rollout, LINES / "rollouts.jsonl")
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        jsonl.write(tmp_path / name, records)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == (LINES / "rollouts.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert list(map(repr, jsonl.iterate(Rollout, tmp_path / "a.jsonl.gz"))) == list(map(repr, records))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"no": 1}\n'))
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz:1: "):
        jsonl.read(Rollout, tmp_path / "c.jsonl.gz")


def test_values_of_earlier_lines() -> None:
    first, *_ = jsonl.read(Problem, LINES / "problems.jsonl")
    assert first.prompt == "é \ud800 \u2028" and (first.cpu_s, first.memory_mb, first.difficulty) == (2.0, 256, None)
    assert first.tests == (
        StdinTest(stdin="1 2\n", expected_stdout="3\n"),
        AssertTest(code="assert f() is None"),
        FunctionTest(
            name="f", args=(1, (2,), {3}, {"a": [1.5, None]}, {1: b"\xff"}, 2j, frozenset({"x"})), expected=None
        ),
        FunctionTest(name="g", args=(), expected={"__a": (True,)}),
    )
    verdict, _ = jsonl.read(Verdict, LINES / "verdicts.jsonl")
    assert (verdict.tests[0].cpu_s, verdict.tests[0].wall_s, verdict.tests[0].peak_memory_mb) == (1e-5, 1e22, 9.0)
    assert (verdict.tests[1].stderr, verdict.tests[1].exit_code, verdict.tests[1].signal) == (b"\xff\x00", None, 9)
    _, second, _ = jsonl.read(Critique, LINES / "critiques.jsonl")
    assert second.text == "\x00\x1f\x7f" and second.generation is not None
    assert second.generation.logprobs[:3] == (-math.inf, -1e-07, -0.1) and math.isnan(second.generation.logprobs[3])


def test_whole_numbers_of_other_programs_are_read_as_floats() -> None:
    result = jsonl.decode(TestResult, {"status": "accepted", "cpu_s": 2})
    assert result.cpu_s == 2.0 and isinstance(result.cpu_s, float)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    line = '{"id": "a", "source": "s", "split": "train", "prompt": "", "tests": []}\n'
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert [problem.id for problem in jsonl.read(Problem, file)] == ["a"]
    file.write_bytes(line.encode() + b"\xef\xbb\xbf" + line.encode())  # anywhere else it is a fault
    with pytest.raises(ValueError, match=r"problems\.jsonl:2: not JSON"):
        jsonl.read(Problem, file)


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
