"""Small files in each data set's true format, and what is said about broken ones."""

import base64
import gzip
import json
import pickle
import zlib

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from ctrl_hpc.data import catalog, livecodebench, table, taco
from ctrl_hpc.records import FunctionTest, StdinTest


def jsonl_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name, path, split="test"):
    return catalog.load(name, path=path, split=split, n=1000, seed=0)


TACO = {
    "question": "Print twice n. The absolute error must be at most 10^{-6}.",
    "solutions": json.dumps(["print(2 * int(input()))", "n = int(input())"]),
    "starter_code": "",
    "input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["2\n", ["4"]]}),
    "difficulty": "MEDIUM_HARD",
    "raw_tags": "[]",
    "name": None,
    "source": "codeforces",
    "url": "https://example.invalid",
    "time_limit": "2.0 seconds",
    "memory_limit": "256.0 megabytes",
}
TACO_CALLS = TACO | {
    "question": "Double it.",
    "starter_code": "def double(x):\n\t",
    "input_output": json.dumps({"fn_name": "double", "inputs": [[1], [[2, 3]]], "outputs": [[2], [[4, 6]]]}),
    "difficulty": "EASY",
    "time_limit": None,
    "memory_limit": None,
    "solutions": "[]",
}


def test_taco(tmp_path):
    path = jsonl_file(tmp_path / "train.jsonl", TACO, TACO_CALLS, TACO | {"input_output": ""})
    streams, calls = load("taco", path, "train")
    assert (streams.id, streams.split, streams.difficulty) == ("taco/train/0", "train", "medium hard")
    assert streams.tests == (
        StdinTest(stdin="1\n", expected_stdout="2\n"),
        StdinTest(stdin="2\n3\n", expected_stdout="4\n"),
    )
    assert (streams.cpu_s, streams.memory_mb, streams.comparison) == (2.0, 256, "float")
    assert (streams.canonical_solution, streams.starter_code) == ("print(2 * int(input()))", None)
    assert calls.tests == (
        FunctionTest(name="double", args=(1,), expected=2),
        FunctionTest(name="double", args=([2, 3],), expected=[4, 6]),
    )
    assert (calls.starter_code, calls.cpu_s, calls.comparison, calls.canonical_solution) == (
        "def double(x):\n\t",
        None,
        None,
        None,
    )


def test_taco_results_that_are_lists_stay_when_not_all_are_wrapped(tmp_path):
    io = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [1, 2]]}
    (problem,) = load("taco", jsonl_file(tmp_path / "a.jsonl", TACO | {"input_output": json.dumps(io)}), "train")
    assert [test.expected for test in problem.tests] == [[1], [1, 2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.0 seconds", 2.0),
        ("1 second", 1.0),
        ("500 milliseconds", 0.5),
        ("0.5-1.0 s", 1.0),
        (None, None),
        ("soon", None),
    ],
)
def test_time_limits(text, expected):
    assert taco.seconds(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("256.0 megabytes", 256), ("65536 KB", 64), ("1.5 gigabytes", 1536), (None, None), ("little", None)],
)
def test_memory_limits(text, expected):
    assert taco.mebibytes(text) == expected


CODECONTESTS = {
    "name": "1_A. Theatre",
    "description": "Print the number.",
    "public_tests": {"input": ["1\n"], "output": ["1\n"]},
    "private_tests": {"input": ["2\n", "1\n"], "output": ["2\n", "1\n"]},
    "generated_tests": {"input": [f"{n}\n" for n in range(3, 20)], "output": [f"{n}\n" for n in range(3, 20)]},
    "source": 2,
    "difficulty": 7,
    "cf_rating": 1500,
    "time_limit": {"seconds": 1, "nanos": 500000000},
    "memory_limit_bytes": 268435456,
    "solutions": {"language": [2, 1, 3], "solution": ["int main(){}", "print 1", "print(input())"]},
}


def test_codecontests_keeps_every_test_once(tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CODECONTESTS]), file)
    (problem,) = load("codecontests", str(file))
    assert problem.id == "codecontests/1_A. Theatre"
    assert [test.stdin for test in problem.tests] == [f"{n}\n" for n in range(1, 20)]
    assert (problem.cpu_s, problem.memory_mb, problem.difficulty) == (1.5, 256, "medium")
    assert problem.canonical_solution == "print(input())"


def test_codecontests_without_rating_or_limits(tmp_path):
    row = CODECONTESTS | {"cf_rating": 0, "difficulty": 1, "time_limit": None, "memory_limit_bytes": 0, "solutions": {}}
    (problem,) = load("codecontests", jsonl_file(tmp_path / "valid.jsonl", row), "dev")
    assert (problem.cpu_s, problem.memory_mb, problem.difficulty, problem.canonical_solution) == (
        None,
        None,
        "easy",
        None,
    )
    assert problem.split == "dev"


def private(cases):
    """Hidden tests as LiveCodeBench publishes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


LIVE = {
    "question_id": "abc370_a",
    "question_title": "A",
    "question_content": "Say it.",
    "platform": "atcoder",
    "contest_date": "2024-09-07T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1\n", "output": "Yes\n", "testtype": "stdin"}]),
    "private_test_cases": private([{"input": "2\n", "output": "No\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
METHOD = LIVE | {
    "question_id": "3495",
    "contest_date": "2024-11-30T18:30:00",
    "starter_code": "class Solution:\n    def total(self, a: List[int], k: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": '["a"]\n0', "output": "true", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "total"}),
}


def test_livecodebench(tmp_path):
    path = jsonl_file(tmp_path / "test.jsonl", LIVE, METHOD, LIVE | {"contest_date": "2024-12-01T00:00:00"})
    stream, method = load("livecodebench", path)
    assert stream.tests == (
        StdinTest(stdin="1\n", expected_stdout="Yes\n"),
        StdinTest(stdin="2\n", expected_stdout="No\n"),
    )
    assert (stream.id, stream.difficulty, stream.starter_code) == ("livecodebench/abc370_a", "easy", None)
    assert method.tests == (
        FunctionTest(name="total", args=([1, 2], 3), expected=6),
        FunctionTest(name="total", args=(["a"], 0), expected=True),
    )
    assert len(load("livecodebench", path, "all")) == 3
    assert len(load("livecodebench", path, "2024-10..2024-12")) == 2


def test_livecodebench_windows():
    assert livecodebench.window("test") == ("2024-08", "2024-11")
    with pytest.raises(ValueError, match=r"no split 'autumn'; allowed: test, all, or YYYY-MM\.\.YYYY-MM"):
        livecodebench.window("autumn")


class Evil:
    def __reduce__(self):
        return (print, ("run!",))


def test_livecodebench_does_not_run_what_is_pickled(tmp_path, capsys):
    bomb = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    path = jsonl_file(tmp_path / "test.jsonl", LIVE | {"private_test_cases": bomb})
    with pytest.raises(
        ValueError, match=r"test\.jsonl:1: private_test_cases: cannot be decoded: holds builtins\.print"
    ):
        load("livecodebench", path)
    assert capsys.readouterr().out == ""


MBPP = {
    "task_id": 2,
    "code": "def similar_elements(a, b):\n  return tuple(set(a) & set(b))",
    "prompt": "Write a function to find the shared elements from the given two lists.",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": [],
    "test_list": ["assert set(similar_elements((3, 4), (4, 5))) == {4}"],
    "test": "import numpy as np\n\ndef is_floats(x) -> bool:\n    return isinstance(x, np.ndarray)\n\n"
    "def assertion(out, exp, atol):\n    assert np.allclose(out, exp)\n\n"
    "inputs = [[(3, 4), (4, 5)]]\nresults = [(4,)]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(similar_elements(*inp), exp, 0)\n",
}


def test_mbppplus(tmp_path, capsys):
    needs = MBPP | {"task_id": 9, "test": "import numpy as np\nassert f() == np.pi"}
    (problem,) = load("mbppplus", jsonl_file(tmp_path / "test.jsonl", MBPP, needs))
    assert problem.id == "MBPP/2"
    assert problem.prompt.endswith(
        "Your code should pass this test:\n\nassert set(similar_elements((3, 4), (4, 5))) == {4}"
    )
    exec(problem.canonical_solution + "\n" + problem.tests[0].code, {})
    with pytest.raises(AssertionError):
        exec("def similar_elements(a, b):\n  return ()\n" + problem.tests[0].code, {})
    assert "left out, as their tests need numpy: 9" in capsys.readouterr().err


def test_files_of_every_kind_hold_the_same_rows(tmp_path):
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    jsonl_file(tmp_path / "a.jsonl", *rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    arrow = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(arrow, tmp_path / "d.parquet")
    with pyarrow.OSFile(str(tmp_path / "e.arrow"), "wb") as out, pyarrow.ipc.new_stream(out, arrow.schema) as stream:
        stream.write_table(arrow)
    for file in sorted(tmp_path.iterdir()):
        assert [row.values for row in table.rows(str(file), hub="x/y", split="test")] == rows


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    jsonl_file(tmp_path / "data" / "train-00000-of-00002.jsonl", {"a": 1})
    jsonl_file(tmp_path / "data" / "train-00001-of-00002.jsonl", {"a": 2})
    jsonl_file(tmp_path / "data" / "test.jsonl", {"a": 3})
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    assert [row["a"] for row in table.rows(str(tmp_path), hub="x/y", split="train")] == [1, 2]
    assert [row["a"] for row in table.rows(str(tmp_path), hub="x/y", split="test")] == [3]


def test_a_saved_data_set_is_read(tmp_path):
    import datasets as hub

    hub.DatasetDict({"test": hub.Dataset.from_list([{"a": 1}])}).save_to_disk(str(tmp_path / "saved"))
    assert [row["a"] for row in table.rows(str(tmp_path / "saved"), hub="x/y", split="test")] == [1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps(TACO) + '\n\n{"question": \n', r"f\.jsonl:3: not JSON: "),
        ('{"question": "q"}\n', r"f\.jsonl:1: input_output: missing; the row has question"),
        ("[1]\n", r"f\.jsonl:1: expected an object, got list"),
        ("", r"f\.jsonl: holds no rows"),
        (json.dumps(TACO | {"question": 3}) + "\n", r"f\.jsonl:1: question: expected text, got int"),
        (json.dumps(TACO | {"input_output": "{"}) + "\n", r"f\.jsonl:1: input_output: not JSON: "),
        (
            json.dumps(TACO | {"input_output": {"inputs": ["1"], "outputs": []}}) + "\n",
            r"f\.jsonl:1: input_output: 1 inputs but 0 outputs",
        ),
    ],
)
def test_a_broken_file_names_line_and_field(content, told, tmp_path):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        load("taco", str(tmp_path / "f.jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "no such file or folder"),
        ("f.csv", r"f\.csv: cannot be read; allowed: \.jsonl"),
        ("empty", "holds no file"),
    ],
)
def test_a_place_that_cannot_be_read(name, told, tmp_path):
    (tmp_path / "f.csv").write_text("a\n1\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=told):
        load("taco", str(tmp_path / name), "train")


def test_a_split_that_is_not_there():
    with pytest.raises(ValueError, match="data: mbppplus has no split 'train'; allowed: test"):
        load("mbppplus", None, "train")


@pytest.mark.parametrize(
    ("statement", "comparison"),
    [
        ("Your answer is right if the absolute or relative error does not exceed 1e-6.", "float"),
        ("Print with precision of at least 10^{-4}.", "float"),
        ("Print the absolute difference.", "float"),
        ("Print the number modulo 10^9+7.", None),
        ("Fix the error in the text.", None),
    ],
)
def test_statements_that_allow_an_error(statement, comparison):
    assert table.comparison_of(statement) == comparison


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("taco", "train", [("arrow", "hf://datasets/BAAI/TACO/train/*.arrow", "train")]),
        (
            "taco",
            "all",
            [
                ("arrow", "hf://datasets/BAAI/TACO/train/*.arrow", "train"),
                ("arrow", "hf://datasets/BAAI/TACO/test/*.arrow", "test"),
            ],
        ),
        ("livecodebench", "test", [("json", "hf://datasets/livecodebench/code_generation_lite/test*.jsonl", "test")]),
        ("codecontests", "dev", [("deepmind/code_contests", None, "valid")]),
        ("mbppplus", "test", [("evalplus/mbppplus", None, "test")]),
        ("humanevalplus", "test", [("evalplus/humanevalplus", None, "test")]),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, name, split, asked):
    """Data sets that come with a program of their own are read by their files: no foreign program is run."""
    import datasets as hub

    from ctrl_hpc.data import catalog

    seen = []

    def load_dataset(place, *, split, data_files=None):
        seen.append((place, data_files and data_files[split], split))
        return []

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    assert catalog.whole(name, None, split) == []
    assert seen == asked
