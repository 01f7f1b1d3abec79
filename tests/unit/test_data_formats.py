"""Small files in each data set's true format, and what is said about broken ones."""

import base64
import datetime
import gzip
import json
import pickle
import tomllib
import zlib
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc import jsonl
from ctrl_hpc.data import catalog, livecodebench, table, taco
from ctrl_hpc.data.statement import comparison_of
from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import FunctionTest, Problem, Rules, StdinTest
from ctrl_hpc.sandbox import judge


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
    assert (streams.cpu_s, streams.memory_mb, streams.comparison) == (2.0, 256, "float:abs=1e-06")
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
    (only,) = load("livecodebench", path)
    assert only.id == "livecodebench/abc370_a"
    stream, method = load("livecodebench", path, "2024-09..2024-11")
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


@pytest.mark.parametrize(
    ("split", "files", "first", "last"),
    [
        ("test", 4, "2024-08-01 00:00:00", "2024-11-01 00:00:00"),
        ("release_v1", 1, None, None),
        ("release_v6", 6, None, None),
        ("release_latest", 6, None, None),
        ("all", 6, None, None),
        ("2024-10..2025-02", 6, "2024-10-01 00:00:00", "2025-02-28 23:59:59.999999"),
        ("release_v5:2024-08..2024-09-15", 5, "2024-08-01 00:00:00", "2024-09-15 00:00:00"),
    ],
)
def test_livecodebench_splits(split, files, first, last):
    part = livecodebench.parts(split)
    assert part.files == ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, files + 1)))
    if first is not None:
        assert (str(part.first), str(part.last)) == (first, last)


def test_livecodebench_single_files():
    assert livecodebench.parts("v5").files == ("test5.jsonl",)
    assert livecodebench.parts("v4_v6").files == ("test4.jsonl", "test5.jsonl", "test6.jsonl")


@pytest.mark.parametrize("split", ["autumn", "release_v7", "v6_v4", "2024-13..2024-14", "release_v4:soon", ""])
def test_livecodebench_has_no_such_split(split):
    with pytest.raises(ValueError, match=rf"livecodebench has no split '{split}'; allowed: test, all, a release"):
        livecodebench.parts(split)


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
        exec("def similar_elements(a, b):\n  return (5,)\n" + problem.tests[0].code, {})
    told = capsys.readouterr().err
    assert "mbppplus: 1 bad rows left out" in told
    assert "test.jsonl:2: test: uses numpy beyond its helpers (pi)" in told


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
        ('{"question": \n', r"f\.jsonl:1: not JSON: "),
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


WORDINGS = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text())["statements"]
KINDS_OF_STATEMENTS = {
    # an error of the usual size, absolute or relative
    "Your answer is right if the absolute or relative error does not exceed 1e-6.": "float",
    "considered correct if its absolute or relative error does not exceed 10^{ - 6}.": "float",
    "The difference between your answer and the jury's must be at most 1e-6.": "float",
    "Print the answer with accuracy 1e-6.": "float",
    "Print the absolute difference.": "float",
    # of another
    "Print with precision of at least 10^{-4}.": "float:abs=0.0001,rel=0.0001",
    "Answers within 10^-5 of the actual answer will be accepted.": "float:abs=1e-05,rel=1e-05",
    "Print it with an error of at most 0.01.": "float:abs=0.01,rel=0.01",
    "The error must be less than 1E-8.": "float:abs=1e-08,rel=1e-08",
    "Your answer should not contain an error greater than 0.00001.": "float:abs=1e-05,rel=1e-05",
    "The answer is correct if its absolute error does not exceed 10^{-9}.": "float:abs=1e-09",
    "The relative error of your output must be within 10<sup>-9</sup>.": "float:rel=1e-09",
    "An absolute error of 1e-6 or a relative error of 1e-9 is allowed.": "float:abs=1e-06,rel=1e-09",
    "The output must be accurate to within 0.001.": "float:abs=0.001,rel=0.001",
    "error less than 10⁻⁷": "float:abs=1e-07,rel=1e-07",
    "with at most 10−8 absolute or relative error": "float:abs=1e-08,rel=1e-08",
    "Your answer must be within 1e-4 of the true value.": "float:abs=0.0001,rel=0.0001",
    "It may differ from the judge's by no more than 10^-3.": "float:abs=0.001,rel=0.001",
    "The tolerance is $10^{-5}$.": "float:abs=1e-05,rel=1e-05",
    # letter case
    "You can print every letter in any case (upper or lower).": "exact:nocase",
    'Print "YES" or "NO" in any case.': "exact:nocase",
    "You may print each letter in upper case or in lower case.": "exact:nocase",
    "Each letter can be printed in any register.": "exact:nocase",
    "The answer is case-insensitive.": "exact:nocase",
    "The case of letters does not matter.": "exact:nocase",
    # several answers
    "If there are multiple answers, print any of them.": "exact:any",
    "If there is more than one answer, output any.": "exact:any",
    "Any of them will be accepted.": "exact:any",
    "You may return the answer in any order.": "exact:any",
    "Print any valid sequence. The absolute error may be 0.1.": "float:abs=0.1,any",
    # nothing of the kind
    "Print the number modulo 10^9+7.": None,
    "Fix the error in the text.": None,
    "In any case, the game ends.": None,
    "Strings in the input are compared case insensitive.": None,
    "If there are many arrays, print the lexicographically smallest.": None,
    "The edges are given in any order.": None,
    "Determine whether any of them can be reached.": None,
    "It is guaranteed that the coordinates differ by at least 0.001.": None,
    "Print the answer rounded to 2 decimal places.": None,
}


@pytest.mark.parametrize("statement", KINDS_OF_STATEMENTS)
def test_what_statements_say_of_answers(statement):
    assert comparison_of(statement) == KINDS_OF_STATEMENTS[statement]


@pytest.mark.parametrize("statement", WORDINGS)
def test_what_statements_say_in_other_words(statement):
    assert (comparison_of(statement) or "") == WORDINGS[statement]


SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
NUMBERS = {
    "1e-{n}": str,
    "1E-{n}": str,
    "1.0e-{n}": str,
    "10^-{n}": str,
    "10^{{-{n}}}": str,
    "10^{{ - {n}}}": str,
    "$10^{{-{n}}}$": str,
    "10**-{n}": str,
    "10^(-{n})": str,
    "10<sup>-{n}</sup>": str,
    "10<sup>&minus;{n}</sup>": str,
    "10−{n}": str,
    "1 × 10^{{-{n}}}": str,
    "$1 \\times 10^{{-{n}}}$": str,
    "\\frac{{1}}{{10^{n}}}": str,
    "10{n}": lambda n: f"-{n}".translate(SUPERSCRIPTS),
    "0.{n}1": lambda n: "0" * (n - 1),
    "1/1{n}": lambda n: "0" * n,
}
"""Ways to write a power of ten, and what of the exponent stands in each."""
ALLOWED = [
    "Your answer is considered correct if its {kind} does not exceed {number}.",
    "Answers with a {kind} of at most {number} are accepted.",
    "The {kind} of your output must be less than {number}",
    "A {kind} of {number} is allowed.",
    "Print the sum with {kind} no more than {number}.",
    "The checker tolerates a {kind} up to {number}!",
]
KINDS = {
    "absolute error": ("abs",),
    "relative error": ("rel",),
    "absolute or relative error": ("abs", "rel"),
    "relative or absolute error": ("abs", "rel"),
    "error": ("abs", "rel"),
}


@settings(derandomize=True, max_examples=300)
@given(
    sentence=st.sampled_from(ALLOWED),
    kind=st.sampled_from(sorted(KINDS)),
    number=st.sampled_from(sorted(NUMBERS)),
    exponent=st.integers(1, 12),
    around=st.sampled_from(
        ["{}", "Find x. {} Print it.", "You are given 3 cities. {}", "Output one number. {} 1 ≤ n ≤ 10^5."]
    ),
)
def test_an_error_in_any_words_is_the_one_that_is_allowed(sentence, kind, number, exponent, around):
    written = number.format(n=NUMBERS[number](exponent))
    bound = f"{float(f'1e-{exponent}'):g}"
    said = ",".join(f"{name}={bound}" for name in KINDS[kind])
    expected = "float" if said == "abs=1e-06,rel=1e-06" else f"float:{said}"
    assert comparison_of(around.format(sentence.format(kind=kind, number=written))) == expected


@settings(derandomize=True, max_examples=200)
@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from("10 ^ - 6 | error any print case answer . 0.1".split())).map(" ".join)
)
def test_any_statement_has_a_comparison_that_exists(text):
    judge.rule(comparison_of(text) or "exact")


# --- as on the hub, through the real datasets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub: ``load_dataset`` takes ``OWNER/NAME`` below it, and files by their paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "HUB_FILES", f"{tmp_path}/")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def publish(name, readme="---\nlicense: cc\n---\n"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(readme)
        return folder

    return publish


def write_arrow(path, rows):
    path.parent.mkdir(exist_ok=True)
    made = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, made.schema) as stream:
        stream.write_table(made)


CONFIGS = "---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
FILES = "  - split: {split}\n    path: {path}\n"


def both(name, folder, split):
    """From the hub and from a copy of its folder: the same problems."""
    read, copied = catalog.read(name, None, split), catalog.read(name, str(folder), split)
    assert [item.id for item in read.items] == [item.id for item in copied.items]
    assert [item.reason for item in read.left_out] == [item.reason for item in copied.left_out]
    return read


def test_livecodebench_of_the_hub(hub):
    folder = hub("livecodebench/code_generation_lite")
    (folder / "code_generation_lite.py").write_text("raise SystemExit('a program of the data set was run')\n")
    jsonl_file(folder / "test.jsonl", LIVE | {"question_id": "old", "contest_date": "2024-03-01T00:00:00"})
    jsonl_file(folder / "test2.jsonl", LIVE, LIVE | {"question_id": "edge", "contest_date": "2024-11-01T00:00:00"})
    jsonl_file(folder / "test3.jsonl", METHOD | {"contest_date": "2024-08-01T00:00:00"})
    with (folder / "test4.jsonl").open("w") as out:
        out.write(
            "{broken\n" + json.dumps(LIVE | {"question_id": "late", "contest_date": "2024-11-01T08:00:00"}) + "\n"
        )
    jsonl_file(folder / "test5.jsonl", LIVE | {"question_id": "v5", "contest_date": "2024-10-05T00:00:00"})
    jsonl_file(folder / "test6.jsonl", LIVE | {"question_id": "v6", "contest_date": "2025-03-05T00:00:00"})
    found = both("livecodebench", folder, "test")
    assert [item.id for item in found.items] == ["livecodebench/abc370_a", "livecodebench/edge", "livecodebench/3495"]
    assert [item.reason[:8] for item in found.left_out] == ["not JSON"]
    assert {(item.harness, item.comparison) for item in found.items} == {("livecodebench", "livecodebench")}
    assert len(both("livecodebench", folder, "release_v1").items) == 1
    assert len(both("livecodebench", folder, "all").items) == 7


def test_livecodebench_of_a_table_with_dates(tmp_path):
    row = LIVE | {"contest_date": datetime.datetime(2024, 9, 7)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test.parquet")
    assert len(load("livecodebench", str(tmp_path))) == 1


def test_taco_of_the_hub(hub):
    folder = hub("BAAI/TACO")
    (folder / "TACO.py").write_text("raise SystemExit('a program of the data set was run')\n")
    huge = "7" * 5000
    io = {"fn_name": "power", "inputs": [[5000]], "outputs": [0]}
    integers = TACO_CALLS | {
        "input_output": json.dumps(io).replace(": [0]", f": [{huge}]"),
        "starter_code": "def power(",
    }
    keys = {"fn_name": "total", "inputs": [[{"1": 10, "2": 20}, {"3": 1}]], "outputs": [{"5": "a"}]}
    dictionary = TACO_CALLS | {"input_output": json.dumps(keys), "starter_code": ""}
    text = TACO_CALLS | {"input_output": json.dumps({"fn_name": "f", "inputs": ["N = 5"], "outputs": [1]})}
    empty = TACO | {"input_output": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["", "\n"]})}
    lone = TACO | {"input_output": '{"inputs": ["\\ud800"], "outputs": ["1"]}'}
    far = TACO | {"input_output": '{"inputs": ["1"], "outputs": [' + "7" * 200_000 + "]}"}
    write_arrow(folder / "train" / "data-00000-of-00002.arrow", [TACO, integers, dictionary, text])
    write_arrow(folder / "train" / "data-00001-of-00002.arrow", [empty, lone, far])
    write_arrow(folder / "test" / "data-00000-of-00001.arrow", [TACO])
    found = both("taco", folder, "train")
    assert [item.id for item in found.items] == ["taco/train/0", "taco/train/1", "taco/train/2"]
    assert found.items[1].tests[0].expected == int(huge)
    assert found.items[2].tests == (FunctionTest(name="total", args=({1: 10, 2: 20}, {"3": 1}), expected={5: "a"}),)
    assert found.items[2].prompt.endswith("assert total({1: 10, 2: 20}, {'3': 1}) == {5: 'a'}\n```")
    assert found.items[1].prompt == "Double it."
    assert [item.reason.split(":")[0] for item in found.left_out] == [
        "input_output",
        "every expected output is empty",
        "tests",
        "input_output",
    ]
    assert [item.id for item in both("taco", folder, "all").items][-1] == "taco/test/0"
    again = jsonl.decode(Problem, json.loads(jsonl.line(found.items[1])))
    assert again == found.items[1]


def test_tacos_list_of_special_judges(tmp_path):
    jsonl_file(tmp_path / "test.jsonl", *[TACO | {"question": f"Say it, {number}."} for number in range(5)])
    cases = [(0, False), (1, True), (2, True), (3, True), (0, True)]
    jsonl_file(
        tmp_path / "output_spj.jsonl",
        *[{"idx": number, "special_judge": judged, "case": case} for number, (case, judged) in enumerate(cases)],
    )
    listed = (tmp_path / "output_spj.jsonl").read_bytes()
    (tmp_path / "output_spj.jsonl").write_bytes(b"\xef\xbb\xbf" + listed)  # with a byte order mark
    found = load("taco", str(tmp_path / "test.jsonl"))
    assert [item.comparison for item in found] == [None, "exact:any", "exact:nocase", "float", "exact:any"]
    train = load("taco", str(tmp_path / "test.jsonl"), "train")
    assert {item.comparison for item in train} == {None}


def test_codecontests_of_the_hub(hub):
    folder = hub(
        "deepmind/code_contests",
        CONFIGS.format(
            name="default",
            files=FILES.format(split="valid", path="data/valid-*") + FILES.format(split="test", path="data/test-*"),
        ),
    )
    (folder / "data").mkdir()
    wrong = {"language": [3, 2, 3], "solution": ["print(0)", "int main(){}", "print(1)"]}
    more = {"incorrect_solutions": wrong, "input_file": "", "output_file": ""}
    files = CODECONTESTS | more | {"name": "files", "input_file": "input.txt", "output_file": "output.txt"}
    two = CODECONTESTS | more | {"name": "two", "solutions": {"language": [3, 3], "solution": ["print 1", "print(1)"]}}
    again = CODECONTESTS | more
    rows = [CODECONTESTS | more, files, two, again]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "test-00000-of-00001-9c.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), folder / "data" / "valid-00000-of-00001-b.parquet")
    found = both("codecontests", folder, "test")
    assert [item.id.removeprefix("codecontests/") for item in found.items] == [
        "1_A. Theatre",
        "two",
        "1_A. Theatre#2",
    ]
    assert found.items[0].wrong_solutions == ("print(0)", "print(1)")
    assert (found.items[0].canonical_solution, found.items[1].canonical_solution) == ("print(input())", "print(1)")
    assert "input_file: reads or writes the file 'input.txt'" in found.left_out[0].reason
    assert len(found.left_out) == 1
    assert [item.split for item in both("codecontests", folder, "dev").items] == ["dev"]


CHECKER = '#include "testlib.h"\nint main(int argc, char *argv[]) { registerTestlibCmd(argc, argv); quitf(_ok, ""); }\n'
CODECONTESTS_PLUS = {
    "source": "Codeforces",
    "id": "1_A",
    "title": "Theatre Square",
    "description": "Print any of the numbers.",
    "time_limit": 1500,
    "memory_limit": 256,
    "validator": "int main() {}",
    "generator": "int main() {}",
    "generator_cmd": "./gen -n 1\n./gen -n 2",
    "checker": CHECKER,
    "correct_submissions": [{"code": "int main() {}", "language": "cpp"}, {"code": "print(1)", "language": "py3"}],
    "incorrect_submissions": [{"code": f"print({n})", "language": "py3"} for n in range(2, 9)],
    "test_cases": [{"input": f"{n}\n", "output": f"{n}\n"} for n in (1, 2, 1)],
    "true_positive_rate": 1.0,
    "true_negative_rate": 0.95,
}


def test_codecontestsplus_of_the_hub(hub):
    parts = "".join(
        f"- config_name: {name}\n  data_files:\n{FILES.format(split='train', path=path)}"
        for name, path in (("default", "part-*"), ("1x", "ccplus_1x/*"), ("2x", "ccplus_2x/*"))
    )
    folder = hub("ByteDance-Seed/Code-Contests-Plus", f"---\nconfigs:\n{parts}---\n")
    (folder / "ccplus_1x").mkdir()
    (folder / "ccplus_2x").mkdir()
    rows = [CODECONTESTS_PLUS, CODECONTESTS_PLUS | {"id": "2_B", "checker": "", "time_limit": None}]
    rows.append(CODECONTESTS_PLUS | {"id": "3_C", "test_cases": []})
    name = "part-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "ccplus_1x" / name)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), folder / "ccplus_2x" / name)
    without = {key: value for key, value in CODECONTESTS_PLUS.items() if key != "test_cases"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([without]), folder / name)
    found = both("codecontestsplus", folder, "train")
    first, second = found.items
    assert (first.id, second.id) == ("codecontestsplus/Codeforces/1_A", "codecontestsplus/Codeforces/2_B")
    assert [test.stdin for test in first.tests] == ["1\n", "2\n"]
    assert (first.cpu_s, first.memory_mb, first.canonical_solution) == (1.5, 256, "print(1)")
    assert first.wrong_solutions == ("print(2)", "print(3)", "print(4)")
    assert (first.checker, first.comparison) == (CHECKER, None)
    assert execution(first, "print(1)", Rules()).checker == CHECKER
    assert (second.checker, second.comparison, second.cpu_s) == (None, "exact:any", None)
    assert [item.reason for item in found.left_out] == ["no tests"]
    assert len(catalog.read("codecontestsplus", str(folder / "ccplus_2x"), "train").items) == 1


MBPP_TEXT = {
    "task_id": 11,
    "text": "Write a python function to remove the first and last 'a'.",
    "code": "def trim(s): \r\n    return s[1:-1]",
    "test_list": ['assert trim("aba") == "b"', 'assert trim("aa") == ""'],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_mbpp_of_the_hub(hub):
    parts = {"prompt": [1], "test": [11, 510], "validation": [511], "train": [601, 974]}
    files = "".join(FILES.format(split=split, path=f"full/{split}-*") for split in parts)
    folder = hub("google-research-datasets/mbpp", CONFIGS.format(name="full", files=files))
    (folder / "full").mkdir()
    for split, numbers in parts.items():
        rows = pyarrow.Table.from_pylist([MBPP_TEXT | {"task_id": number} for number in numbers])
        pyarrow.parquet.write_table(rows, folder / "full" / f"{split}-00000-of-00001.parquet")
    assert [item.id for item in both("mbpp", folder, "test").items] == ["mbpp/11", "mbpp/510"]
    assert [item.split for item in both("mbpp", folder, "all").items] == [
        "prompt",
        "test",
        "test",
        "dev",
        "train",
        "train",
    ]
    assert len(both("mbpp", folder, "dev").items) == len(both("mbpp", folder, "validation").items) == 1


def test_mbpp_of_a_file(tmp_path):
    setup = MBPP_TEXT | {"task_id": 600, "test_setup_code": "root = 1", "test_list": ["assert f(root)"]}
    bad = MBPP_TEXT | {"task_id": 13, "test_list": []}
    path = jsonl_file(tmp_path / "mbpp.jsonl", *[MBPP_TEXT | {"task_id": n} for n in (10, 11, 510, 601)], setup, bad)
    loaded = catalog.read("mbpp", path, "test")
    assert [item.id for item in loaded.items] == ["mbpp/11", "mbpp/510"]
    assert [item.reason for item in loaded.left_out] == ["test_list: expected a list of assertions"]
    assert loaded.items[0].prompt.endswith('these tests:\n\nassert trim("aba") == "b"\nassert trim("aa") == ""')
    assert [test.code for test in loaded.items[0].tests] == ['assert trim("aba") == "b"\n', 'assert trim("aa") == ""\n']
    assert loaded.items[0].canonical_solution == "def trim(s): \n    return s[1:-1]"
    assert catalog.read("mbpp", path, "validation").items[0].tests[0].code == "root = 1\nassert f(root)\n"
    assert len(catalog.read("mbpp", path, "all").items) == 5


FLOATS = "import numpy as np\n\ndef is_floats(x) -> bool:\n    return isinstance(x, float)\n\n"
SETS = FLOATS + (
    "def assertion(out, exp, atol):\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n    out = set(out)\n"
    "    exp = set(exp)\n    if out != exp and atol != 0:\n"
    "        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
    "    else:\n        assert out == exp\n"
)
NOT_NONE = (
    "import numpy as np\n\ndef assertion(out, exp, atol):\n"
    "    if isinstance(out, bool):\n        exact_match = out == exp\n"
    "    else:\n        exact_match = exp == (out is not None)\n"
)
EITHER = (
    "import math\n\ndef _other(x):\n    return x + 1\n\ndef assertion(out, exp_0, exp_1, atol):\n"
    "    assert abs(out - exp_0) <= atol or abs(out - exp_1) <= atol\n"
)
LOOP = "\ninputs = {inputs}\nresults = {results}\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n    {call}\n"
ORACLES = {
    "sets": (SETS, "[[(3, 4)]]", "[(4, 3)]", "assertion(f(*inp), exp, 0)", "return (3, 4)", "return (3, 5)"),
    "not none": (
        NOT_NONE,
        "[['a'], ['b']]",
        "[True, False]",
        "assertion(f(*inp), exp, 0)",
        "return x == 'a'",
        "return True",
    ),
    "either": (EITHER, "[[1]]", "[1]", "assertion(f(*inp), exp, _other(*inp), 0)", "return 2", "return 3"),
}


@pytest.mark.parametrize("name", ORACLES)
def test_mbppplus_keeps_each_problems_own_oracle(name, hub):
    oracle, inputs, results, call, right, wrong = ORACLES[name]
    row = MBPP | {
        "code": f"def f(x):\n    {right}\n",
        "test": oracle + LOOP.format(inputs=inputs, results=results, call=call),
    }
    folder = hub(
        "evalplus/mbppplus", CONFIGS.format(name="default", files=FILES.format(split="test", path="data/test-*"))
    )
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "data" / "test-00000-of-00001-d5.parquet")
    (problem,) = both("mbppplus", folder, "test").items
    exec(problem.canonical_solution + problem.tests[0].code, {})
    with pytest.raises(AssertionError):
        exec(f"def f(x):\n    {wrong}\n" + problem.tests[0].code, {})


def test_humanevalplus_of_the_hub(hub):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one() -> int:\n    ''' One. '''\n",
        "canonical_solution": "    return 1\n",
        "entry_point": "one",
        "test": "import numpy as np\n\ndef check(candidate):\n    assert np.allclose(candidate(), 1, atol=0)\n",
    }
    folder = hub(
        "evalplus/humanevalplus", CONFIGS.format(name="default", files=FILES.format(split="test", path="data/*"))
    )
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "data" / "test-00000-of-00001-5.parquet")
    (problem,) = both("humanevalplus", folder, "test").items
    exec(problem.canonical_solution + problem.tests[0].code, {})
    assert problem.harness == "humaneval"


# --- bad rows


def test_bad_rows_are_left_out_counted_and_named(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(
        "\ufeff"
        + json.dumps(TACO)
        + "\n{broken\n[1]\n"
        + json.dumps(TACO | {"question": None})
        + "\n"
        + json.dumps(TACO | {"input_output": '{"inputs": 3}'})
        + "\n"
        + json.dumps({"question": "q"})
        + "\n"
    )
    loaded = catalog.read("taco", str(tmp_path / "train.jsonl"), "train")
    assert [item.id for item in loaded.items] == ["taco/train/0"]
    assert [item.where.rpartition(":")[2] for item in loaded.left_out] == ["2", "3", "4", "5", "6"]
    assert catalog.whole("taco", str(tmp_path / "train.jsonl"), "train") == loaded.items
    told = capsys.readouterr().err
    assert "taco: 5 bad rows left out" in told
    assert "train.jsonl:4: question: expected text, got NoneType" in told


def test_a_bad_line_of_our_own_schema_is_left_out(tmp_path):
    good = {
        "id": "a",
        "source": "s",
        "split": "train",
        "prompt": "p",
        "tests": [{"kind": "stdin", "stdin": "", "stdout": "1"}],
    }
    path = jsonl_file(tmp_path / "p.jsonl", good, good | {"id": "b", "test": 1}, good | {"id": "c", "tests": []})
    loaded = catalog.read("jsonl", path, "train")
    assert [item.id for item in loaded.items] == ["a"]
    assert [item.reason.split(";")[0] for item in loaded.left_out] == ["test: unknown field", "no tests"]


def test_only_bad_rows_are_one_line(tmp_path):
    path = jsonl_file(tmp_path / "f.jsonl", {"question": "q"}, {"question": "r"})
    with pytest.raises(ValueError, match=r"f\.jsonl:1: input_output: missing; .* \(and 1 more rows\)$"):
        load("taco", path, "train")


def test_text_that_cannot_be_encoded_is_made_well_formed_or_left_out(tmp_path):
    question = json.dumps(TACO | {"question": "Say \ud83d!"})
    path = tmp_path / "f.jsonl"
    path.write_text(
        question + "\n" + json.dumps(TACO | {"input_output": '{"inputs": ["1"], "outputs": ["\\udc00"]}'}) + "\n"
    )
    loaded = catalog.read("taco", str(path), "train")
    assert [item.prompt for item in loaded.items] == ["Say \ufffd!"]
    assert loaded.left_out[0].reason == "tests: expected_stdout: holds a lone surrogate, which cannot be encoded"


def test_a_second_problem_of_an_id_is_left_out_of_our_own_schema(tmp_path):
    good = {
        "id": "a",
        "source": "s",
        "split": "train",
        "prompt": "p",
        "tests": [{"kind": "stdin", "stdin": "", "stdout": "1"}],
    }
    odd = {"harness": "apps"}, {"comparison": "float:abs=x"}, {"comparison": "exact:maybe"}
    others = [good | change | {"id": f"{number}"} for number, change in enumerate(odd)]
    loaded = catalog.read("jsonl", jsonl_file(tmp_path / "p.jsonl", good, good, *others, good | {"id": "b"}), "train")
    assert [item.id for item in loaded.items] == ["a", "b"]
    reasons = [item.reason for item in loaded.left_out]
    assert reasons[0] == "id: an earlier problem has the id 'a' too"
    assert [reason.split(":")[0] for reason in reasons[1:]] == ["harness", "comparison", "comparison"]


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n    ''' Itself. '''\n",
    "canonical_solution": "    return x\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}
PLUS = MBPP | {"test": "assert f(1) == 1\n"}
BAD = [
    (
        "taco",
        TACO,
        "input_output",
        '{"inputs": ["1"], "outputs": [null]}',
        "expected text or a list of lines, got None",
    ),
    ("taco", TACO, "input_output", '{"inputs": [["1", {}]], "outputs": ["2"]}', "expected text or a list of lines"),
    ("taco", TACO, "input_output", '{"inputs": {"a": 1}, "outputs": {"b": 2}}', "inputs: expected a list, got dict"),
    ("taco", TACO, "input_output", '{"inputs": null, "outputs": []}', "inputs: expected a list, got NoneType"),
    ("taco", TACO, "input_output", "[1, 2]", "'list' object has no attribute"),
    ("taco", TACO, "input_output", "", "no tests"),
    ("taco", TACO, "input_output", '{"fn_name": "a b", "inputs": [[1]], "outputs": [1]}', "'a b' is not a function"),
    ("taco", TACO, "input_output", '{"fn_name": 5, "inputs": [[1]], "outputs": [1]}', "expected text, got int"),
    ("taco", TACO, "starter_code", ["def"], "starter_code: expected text, got list"),
    ("taco", TACO, "input_output", "[" * 100_000, "input_output: not JSON"),
    ("livecodebench", LIVE, "public_test_cases", "[null]", "'NoneType' object"),
    ("livecodebench", LIVE, "contest_date", "soon", "contest_date: 'soon' is not a date"),
    ("livecodebench", LIVE, "contest_date", 10**30, "is not a date"),
    ("livecodebench", METHOD, "metadata", "{}", "func_name: missing"),
    ("livecodebench", METHOD, "metadata", '{"func_name": 7}', "expected text, got int"),
    ("livecodebench", LIVE, "difficulty", 3, "difficulty: expected text, got int"),
    ("codecontests", CODECONTESTS, "public_tests", {"input": ["1", "2"], "output": ["1"]}, "2 inputs but 1 outputs"),
    ("codecontests", CODECONTESTS, "public_tests", {"input": ["1"], "output": [None]}, "expected text, got NoneType"),
    ("codecontests", CODECONTESTS, "time_limit", {"seconds": "two", "nanos": 0}, "could not convert"),
    ("codecontestsplus", CODECONTESTS_PLUS, "test_cases", [{"input": "1"}], "KeyError: 'output'"),
    ("codecontestsplus", CODECONTESTS_PLUS, "checker", 7, "checker: expected text, got int"),
    ("mbpp", MBPP_TEXT, "task_id", "11", "task_id: expected a number, got str"),
    ("mbpp", MBPP_TEXT, "test_list", ["assert f(1) =="], "tests: code: not Python"),
    ("mbpp", MBPP_TEXT, "test_list", ["f"], "checks nothing: every program would pass"),
    ("mbpp", MBPP_TEXT, "test_setup_code", 5, "test_setup_code: expected text"),
    ("mbppplus", PLUS, "test", "", "checks nothing: every program would pass"),
    ("mbppplus", PLUS, "test_imports", "import math", "test_imports: expected a list of lines"),
    ("mbppplus", PLUS, "task_id", None, "task_id: expected a number, got NoneType"),
    ("humaneval", HUMANEVAL, "entry_point", "g", "prompt: does not define 'g', the entry point"),
    ("humaneval", HUMANEVAL, "test", "assert True", "test: does not define the function check"),
    ("humaneval", HUMANEVAL, "test", "def check(c):\n    assert", "tests: code: not Python"),
    ("humaneval", HUMANEVAL, "prompt", "def f(", "prompt: not Python"),
]


@pytest.mark.parametrize(("name", "good", "column", "value", "told"), BAD)
def test_a_row_that_is_bad_in_one_column_says_why(name, good, column, value, told, tmp_path):
    path = jsonl_file(tmp_path / "f.jsonl", good, good | {column: value})
    loaded = catalog.read(name, path, split_of(name))
    assert len(loaded.items) == len(loaded.left_out) == 1
    assert told in loaded.left_out[0].reason


def test_limits_and_known_wrong_programs_that_cannot_be_are_unknown(tmp_path):
    odd = [{"seconds": -5, "nanos": 0}, {"seconds": 10**9, "nanos": 0}, {"seconds": None, "nanos": None}]
    wrong = {"language": [3, 3], "solution": [None, "print('\ud800')"]}
    rows = [CODECONTESTS | {"name": str(number), "time_limit": limit} for number, limit in enumerate(odd)]
    rows.append(CODECONTESTS | {"memory_limit_bytes": 10**60, "incorrect_solutions": wrong})
    loaded = catalog.read("codecontests", jsonl_file(tmp_path / "f.jsonl", *rows), "test")
    assert [item.cpu_s for item in loaded.items[:3]] == [None] * 3
    assert loaded.items[3].memory_mb is None and loaded.items[3].wrong_solutions == ("print('\ufffd')",)


ODD = [None, 0, -1, 3.5, float("nan"), 10**400, True, "", " ", "\ud800", "x", [], [None], [1], [[]], {}, {"a": None}]
ODD += ["null", "[]", "{}", "[1", "\x00", '{"inputs": [null], "outputs": [null]}', '[{"input": 1, "output": 2}]']
ODD += [{"input": [1], "output": [2]}, {"language": [3], "solution": [None]}, ["a", "\ud800"], {"seconds": "2"}]
PUBLISHED = {
    "taco": TACO,
    "livecodebench": LIVE,
    "codecontests": CODECONTESTS,
    "mbpp": MBPP_TEXT,
    "codecontestsplus": CODECONTESTS_PLUS,
    "mbppplus": PLUS,
    "humaneval": HUMANEVAL,
    "humanevalplus": HUMANEVAL,
}


def split_of(name):
    return "all" if name == "livecodebench" else "train" if name == "codecontestsplus" else "test"


OWN = {"id": "a", "source": "s", "split": "test", "prompt": "p"} | {
    "tests": [{"kind": "stdin", "stdin": "", "stdout": "1"}]
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", [*PUBLISHED, "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(name, gzipped, tmp_path):
    text = b"\xef\xbb\xbf" + (json.dumps((PUBLISHED | {"jsonl": OWN})[name]) + "\n").encode()
    file = tmp_path / ("f.jsonl.gz" if gzipped else "f.jsonl")
    file.write_bytes(gzip.compress(text) if gzipped else text)
    loaded = catalog.read(name, str(file), split_of(name))
    assert len(loaded.items) == 1 and not loaded.left_out


def test_a_byte_order_mark_in_the_hubs_layout(hub):
    folder = hub("livecodebench/code_generation_lite")
    for number, name in enumerate(("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl")):
        line = json.dumps(LIVE | {"question_id": f"q{number}"}) + "\n"
        (folder / name).write_bytes(b"\xef\xbb\xbf" + line.encode())
    loaded = both("livecodebench", folder, "test")
    assert len(loaded.items) == 4 and not loaded.left_out


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_value_in_any_column_leaves_a_problem_that_can_be_kept_or_a_row_left_out(name, tmp_path):
    """What is loaded can be written, read again and encoded; the other rows are loaded whatever one holds."""
    good = PUBLISHED[name]
    rows = [good | {column: value} for column in good for value in ODD]
    rows += [{key: value for key, value in good.items() if key != column} for column in good]
    loaded = catalog.read(name, jsonl_file(tmp_path / "f.jsonl", good, *rows), split_of(name))
    outside = len(rows) + 1 - len(loaded.items) - len(loaded.left_out)
    assert outside == (4 if name == "mbpp" else 0)  # tasks 0, -1, 10**400 and True are of no split
    for item in loaded.items:
        text = jsonl.line(item)
        assert repr(jsonl.decode(Problem, json.loads(text))) == repr(item)
        assert text.encode() and item.id.encode() and item.prompt.encode()
        assert (item.canonical_solution or " ").encode() and (item.provenance or " ").encode()
        judge.check(execution(item, item.canonical_solution or "", Rules()))
