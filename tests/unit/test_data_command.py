"""``ctrl-hpc data``: by name and by configuration, with sizes, provenance and what decontamination took."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from ctrl_hpc import cli, jsonl, pipeline
from ctrl_hpc.config import ROOT, DataConfig, load
from ctrl_hpc.data import catalog, inventory
from ctrl_hpc.records import Problem, StdinTest

STATEMENT = (
    "You are given an array of n integers and an integer k. In one operation you may choose any element and replace it "
    "by its remainder modulo k. Print the least number of operations after which all elements are equal."
)
OTHER = "Read a line and print it in reverse order, without the spaces at its beginning and at its end, in lower case."


def problem(identity, prompt, split):
    tests = (StdinTest(stdin="1\n", expected_stdout="2\n"), StdinTest(stdin="2\n", expected_stdout="3\n"))
    return Problem(id=identity, source="ours", split=split, prompt=prompt, tests=tests, difficulty="easy", cpu_s=1.0)


def taco_row(question, number):
    """A row of TACO as the hub has it."""
    return {
        "question": question,
        "solutions": '["print(2)"]',
        "starter_code": "",
        "input_output": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}',
        "difficulty": "VERY_HARD",
        "time_limit": "2.0 seconds",
        "memory_limit": "256.0 megabytes",
        "url": f"https://example.org/{number}",
    }


@pytest.fixture
def places(tmp_path):
    """TACO with two problems, one of which our benchmark has too; and the same two in our own schema."""
    train = tmp_path / "taco" / "train.jsonl"
    train.parent.mkdir()
    train.write_text(json.dumps(taco_row(STATEMENT, 0)) + "\n" + json.dumps(taco_row(OTHER, 1)) + "\n")
    test = tmp_path / "taco" / "test.jsonl"
    test.write_text(json.dumps(taco_row("Print the sum of two numbers.", 2)) + "\n")
    jsonl.write(tmp_path / "benchmark.jsonl", [problem("b/0", STATEMENT.upper(), "test")])
    jsonl.write(tmp_path / "train.jsonl", [problem("t/0", STATEMENT, "train"), problem("t/1", OTHER, "train")])
    return tmp_path


def test_by_name_with_sizes_provenance_and_what_went(places, capsys):
    out = places / "out.jsonl"
    arguments = ["data", "taco", "--path", str(places / "taco"), "--split", "all", "--out", str(out)]
    assert cli.main([*arguments, "--against", f"jsonl={places / 'benchmark.jsonl'}"]) == 0
    written = jsonl.read(Problem, out)
    assert [item.id for item in written] == ["taco/train/1", "taco/test/0"]
    train = places / "taco" / "train.jsonl"
    assert written[0].provenance == f"{train}:2 https://example.org/1"
    told = capsys.readouterr().err
    assert "taco, split all: 3 problems (-26440 against 26443; arXiv 2502.03492" in told
    assert "1 of 3 training problems left out as near-duplicates" in told
    assert "jsonl (1 problems): 1 same text" in told
    facts = json.loads((places / "out.jsonl.provenance.json").read_text())
    assert facts["sources"][str(train)] == {"problems": 2, "sha256": hashlib.sha256(train.read_bytes()).hexdigest()}
    assert facts["decontamination"]["left_out"] == [
        {"train_id": "taco/train/0", "benchmark": "jsonl", "benchmark_id": "b/0", "reason": "same text", "overlap": 1.0}
    ]
    assert (facts["tests"], facts["test_kinds"], facts["difficulty"]) == (3, {"StdinTest": 3}, {"very hard": 3})
    assert (facts["written"], facts["with_time_limit"], facts["with_memory_limit"]) == (2, 3, 3)


def test_humaneval_whole_is_as_it_should_be(capsys):
    assert cli.main(["data", "humaneval", "--n", "2"]) == 0
    out, told = capsys.readouterr()
    assert "humaneval, split test: 164 problems (as it should be; published)" in told
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["HumanEval/0", "HumanEval/1"]


def test_by_configuration(places, capsys):
    config = str(ROOT / "configs" / "tiny.yaml")
    settings = [f"data.path={places / 'train.jsonl'}", "data.name=jsonl", "data.eval_names=[jsonl]"]
    assert cli.main(["data", config, *settings, f"data.eval_path={places / 'benchmark.jsonl'}"]) == 0
    out, told = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["t/1"]
    assert "1 of 2 training problems left out" in told
    off = "data.decontaminate=false"
    assert cli.main(["data", config, *settings, f"data.eval_path={places / 'benchmark.jsonl'}", off]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tacco"], "data: 'tacco' is not a data set; allowed: tiny"),
        (["humaneval", "data.n_train=3"], "'data.n_train=3': overrides go with a configuration"),
        (["humaneval", "--n", "0"], "--n: 0 is not allowed; it must be greater than 0"),
        ([str(ROOT / "configs" / "tiny.yaml"), "--n", "3"], "--path, --split, --n and --against go with the name"),
        (["taco", "--path", "/no/where"], "/no/where: no such file or folder"),
        (["judgebench", "--split", "test", "--path", "/no"], "judgebench has no split 'test'; allowed: gpt, claude"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, told, capsys):
    assert cli.main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_further_benchmarks_and_places_of_their_own(places):
    data = DataConfig(
        name="taco",
        path=str(places / "taco"),
        eval_names=(),
        benchmarks={"jsonl": str(places / "benchmark.jsonl")},
    )
    found = catalog.prepared(data, 0)
    problems, left_out = found.problems, found.decontamination
    assert left_out is not None
    assert [item.id for item in problems] == ["taco/train/1"]
    assert (left_out["n_before"], left_out["n_after"]) == (2, 1)
    data = DataConfig(eval_path="/everywhere", eval_paths={"humaneval": "/here"})
    assert catalog.eval_path(data, "humaneval") == "/here"
    assert catalog.eval_path(data, "mbppplus") == "/everywhere"


def test_a_run_keeps_what_went(places, tmp_path):
    settings = [f"data.path={places / 'train.jsonl'}", "data.name=jsonl", "data.eval_names=[jsonl]"]
    config = load(ROOT / "configs" / "tiny.yaml", [*settings, f"data.eval_paths.jsonl={places / 'benchmark.jsonl'}"])
    this = pipeline.prepare(config, tmp_path / "run", ["sample"])
    assert [item.id for item in this.problems] == ["t/1"]
    report = json.loads((tmp_path / "run" / "problems" / "decontamination.json").read_text())
    assert [item["train_id"] for item in report["left_out"]] == ["t/0"]
    assert [item.id for item in this.eval_problems["jsonl"]] == ["b/0"]


def test_the_tiny_world_is_not_compared_with_itself():
    assert catalog.benchmarks(DataConfig()) == {}


def test_nothing_left_is_one_line(places):
    jsonl.write(places / "train.jsonl", [problem("t/0", STATEMENT, "train")])
    data = DataConfig(
        name="jsonl",
        path=str(places / "train.jsonl"),
        eval_names=("jsonl",),
        eval_path=str(places / "benchmark.jsonl"),
    )
    with pytest.raises(ValueError, match=r"^data\.decontaminate: every problem of jsonl is like one of jsonl$"):
        catalog.prepared(data, 0)


def test_every_expected_size_belongs_to_a_data_set():
    assert {name for name, _ in inventory.PAPER} <= {*catalog.DATASETS, "judgebench"}
    assert inventory.expected("codecontests", "test")[0] == 165
    assert inventory.expected("jsonl", "train") is None


def test_a_hub_out_of_reach_is_one_line():
    nowhere = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "ctrl_hpc.cli", "data", "taco"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=nowhere)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ctrl-hpc: BAAI/TACO: cannot be loaded from the hub (")
    assert last.endswith("; give local files with data.path") and "Traceback" not in done.stderr
