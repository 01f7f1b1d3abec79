"""The rules of the paper's training set, each by its key, and together."""

import json

import pytest

from ctrl_hpc.config import ROOT, DataConfig, load
from ctrl_hpc.config.method import FilterConfig
from ctrl_hpc.data import catalog, filters
from ctrl_hpc.records import Problem, StdinTest

PAPER = FilterConfig(
    without=("<image>", "<span "),
    min_tokens=3,
    max_tokens=8,
    unique=True,
    stdin_without=(" = ", "[]"),
    list_streams=False,
)


def problem(identity, prompt, *inputs, split="train"):
    tests = tuple(StdinTest(stdin=text, expected_stdout="1") for text in inputs or ("1\n",))
    return Problem(id=identity, source="s", split=split, prompt=prompt, tests=tests)


PROBLEMS = [
    problem("kept", "one two three four", "1\n", "n = 5\n"),
    problem("image", "see <image> one two"),
    problem("markup", "see <span class> one two"),
    problem("repeated", " one two three four\n"),
    problem("repeated in another split", "one two three four", split="test"),
    problem("short", "one two three"),
    problem("long", "one two three four five six seven eight"),
    problem("short, of another split", "one", split="test"),
    problem("literals", "one two three five", "n = 5", "[]"),
]


def count(text):
    return len(text.split())


def test_all_rules_together():
    kept, taken = filters.apply(PROBLEMS, PAPER, count)
    assert [item.id for item in kept] == ["kept", "repeated in another split", "short, of another split"]
    assert [test.stdin for test in kept[0].tests] == ["1\n"]
    assert taken == {"without": 2, "tokens": 2, "unique": 1, "stdin_without": 1}


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        (FilterConfig(), set()),
        (FilterConfig(without=("<image>",)), {"image"}),
        (FilterConfig(unique=True), {"repeated"}),
        (FilterConfig(min_tokens=3), {"short"}),
        (FilterConfig(max_tokens=8), {"long"}),
        (FilterConfig(stdin_without=("[]", " = ")), {"literals"}),
    ],
)
def test_each_rule_by_itself(rules, gone):
    kept, _ = filters.apply(PROBLEMS, rules, count)
    assert {item.id for item in PROBLEMS} - {item.id for item in kept} == gone


def row(question, inputs="1\n"):
    tests = json.dumps({"inputs": [inputs, "2\n"], "outputs": ["1", "2"]})
    return {"question": question, "solutions": "[]", "input_output": tests}


def test_a_run_filters_before_it_decontaminates(tmp_path):
    rows = [row("Add the two numbers of the line."), row("See <image>."), row("Say it once.", ["1"])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    data = DataConfig(
        name="taco",
        path=str(tmp_path / "train.jsonl"),
        eval_names=(),
        filters=FilterConfig(without=("<image>",), list_streams=False, min_tokens=1),
    )
    found = catalog.prepared(data, 0, critic=str(ROOT / "models" / "tiny" / "critic"))
    assert sorted(len(item.tests) for item in found.problems) == [1, 2]
    assert found.filtered == {"without": 1}


def test_tokens_need_a_tokenizer(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row("q")) + "\n")
    data = DataConfig(name="taco", path=str(tmp_path / "train.jsonl"), filters=FilterConfig(min_tokens=3))
    with pytest.raises(ValueError, match=r"^data\.filters\.tokenizer: missing"):
        catalog.prepared(data, 0)
    with pytest.raises(ValueError, match=r"^data\.filters\.tokenizer: /nowhere: cannot be loaded"):
        catalog.prepared(data, 0, critic="/nowhere")


def test_nothing_left_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row("q <image>")) + "\n")
    data = DataConfig(name="taco", path=str(tmp_path / "train.jsonl"), filters=FilterConfig(without=("<image>",)))
    with pytest.raises(ValueError, match=r"^data\.filters: no problem of taco is left"):
        catalog.prepared(data, 0)


def test_the_papers_configuration_has_its_rules():
    config = load(ROOT / "configs" / "qwen25_coder_32b.yaml", validate=False)
    assert config.data.split == "all"
    assert config.data.filters.without == ("<image>", "<span ")
    assert (config.data.filters.min_tokens, config.data.filters.max_tokens) == (64, 2048)
