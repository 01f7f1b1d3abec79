"""JudgeBench: its format, what votes decide, and accuracy by category from a critic's own words."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import toy_world

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.data import judgebench
from ctrl_hpc.evaluate import judgebench as judging
from ctrl_hpc.evaluate.judgebench import Votes, pairs_file, winners
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.comparison import compared, comparison_chat, comparison_template, judged_apart, parse_choice
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Generation
from ctrl_hpc.report import page, results

SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench", "mmlu-pro-math")


def row(number):
    """A row as the hub has it; the right answer says so."""
    right = "AB"[number % 2]
    return {
        "pair_id": f"id-{number}",
        "original_id": str(number),
        "source": SOURCES[number % len(SOURCES)],
        "question": f"question {number}",
        "response_model": "gpt-4o-2024-05-13",
        "response_A": "good" if right == "A" else "bad",
        "response_B": "good" if right == "B" else "bad",
        "label": f"{right}>{'B' if right == 'A' else 'A'}",
    }


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "gpt.jsonl"
    place.write_text("".join(json.dumps(row(number)) + "\n" for number in range(10)))
    return place


def test_the_data_sets_own_format(file):
    pairs = judgebench.load(str(file), "gpt")
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content)  # a byte order mark is no part of the first pair
    assert judgebench.load(str(file), "gpt") == pairs
    assert [pair.right for pair in pairs[:2]] == ["A", "B"]
    assert judgebench.categories(pairs) == {"knowledge": 4, "reasoning": 2, "math": 2, "coding": 2}
    assert pairs[3].provenance == f"{file}:4"
    file.write_text(json.dumps(row(0) | {"source": "ours"}) + "\n")
    assert judgebench.categories(judgebench.load(str(file), "gpt")) == {"ours": 1}
    with pytest.raises(ValueError, match="judgebench has no split 'test'; allowed: gpt, claude"):
        judgebench.load(str(file), "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "A=B"}, r":1: label: 'A=B' is not one of A>B, B>A"),
        ({"source": None}, r":1: source: expected text, got NoneType"),
    ],
)
def test_a_row_that_cannot_be_is_one_line(tmp_path, change, message):
    place = tmp_path / "gpt.jsonl"
    place.write_text(json.dumps(row(0) | change) + "\n")
    with pytest.raises(ValueError, match=message):
        judgebench.load(str(place), "gpt")


def test_what_votes_decide():
    assert compared(["A", "A", "B"], []) == "A"
    assert compared(["A"], ["A"]) is None  # the first place, whichever answer stands there
    assert compared(["A"], ["B"]) == "A"
    assert compared([None], ["A"]) == "B"
    assert judged_apart(["correct", None], ["incorrect", "correct"]) is None
    assert judged_apart(["incorrect"], ["correct"]) == "B"
    votes = Votes(pair="p", first=("correct", "incorrect", "correct"), second=("incorrect", "correct", "none"))
    assert winners("pointwise", votes, 1) == ["A", "B", "A"]
    assert winners("pointwise", votes, 2) == [None]
    assert winners("pointwise", votes, 3) == ["A"]
    votes = Votes(pair="p", first=("A", "B"), second=("B", "B"))
    assert winners("pairwise", votes, 1) == ["A", "B"]
    assert winners("pairwise", votes, 2) == ["A", None]
    assert winners("pairwise", votes, 4) == ["A"]
    assert winners("pairwise", Votes(pair="p", first=("A", "B", "B"), second=()), 3) == ["B"]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Analysis: A is wrong.\nBetter answer: B", "B"),
        ("**Better answer:** A.", "A"),
        ("## Better answer\nB", "B"),
        ("Better answer: A or B", None),
        ("Better answer: A\nBetter answer: B", None),
        ("```\nBetter answer: A\n```", None),
        ("Overall judgment: answer b", "B"),
        ("The better answer is (A)", "A"),
        ("**Better answer：** \\boxed{B}<|im_end|>", "B"),
        ("So: $\\boxed{\\text{A}}$", "A"),
        ("My choice: [[B]]", "B"),
        ("<think>Better answer: A</think>\nBetter answer: B.", "B"),
        ("<think>Better answer: A", None),
        ("", None),
    ],
)
def test_the_better_answer_is_read_from_its_line(text, choice):
    assert parse_choice(text) == choice


WORDINGS = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text())["choices"]


@pytest.mark.parametrize("text", WORDINGS)
def test_the_better_answer_in_other_words(text):
    assert (parse_choice(text) or "") == WORDINGS[text]


def test_the_comparison_shows_both_answers():
    template = comparison_template(None)
    (message,) = comparison_chat(template, None, "Q?", "1st", "2nd")
    assert message.content.index("Q?") < message.content.index("1st") < message.content.index("2nd")
    assert [item.role for item in comparison_chat(template, "S", "Q?", "one", "two")] == ["system", "user"]


class Judge(toy_world.Critic):
    """Judges an answer rightly in all but every third of its votes; prefers the first place when it compares."""

    def complete(self, chats, sampling):
        out = []
        for chat in chats:
            text = chat[0].content
            self.asked += 1
            if "<answer-a>" in text:
                first = re.search(r"<answer-a>\n(\w+)", text)[1]
                texts = [
                    "Better answer: A" if j % 2 or first == "good" else "Better answer: B" for j in range(sampling.n)
                ]
            else:
                right = "good" in text.split("<answer>")[1]
                texts = [
                    f"Overall judgment: {'Correct' if right != (j % 3 == 2) else 'Incorrect'}"
                    for j in range(sampling.n)
                ]
            out.append([Generation(text=text) for text in texts])
        return out


def evaluated(tmp_path, file, *overrides):
    toy_world.folder(tmp_path / "base", 0.5)
    settings = [f"run_dir={tmp_path / 'run'}", "data.eval_names=[]", "eval.critics=[base]", f"judge.path={file}"]
    settings += [f"critic.model={tmp_path / 'base'}", "eval.bootstrap=100", "eval.chunk=6", *overrides]
    config = load(ROOT / "configs" / "tiny.yaml", [*settings, "wandb.mode=disabled", "prompts.folder=default"])
    connections = toy_world.Connections()
    connections.critic = Judge()
    jsonl.write(pairs_file(tmp_path / "run"), judgebench.load(config.judge.path, config.judge.split))
    run(config, tmp_path / "run", connections, {}, Prompts.load("default"))
    asked = connections.critic.asked
    run(config, tmp_path / "run", connections, {}, Prompts.load("default"))
    assert connections.critic.asked == asked
    return config, tmp_path / "run"


def test_each_answer_judged_by_itself(tmp_path, file):
    config, run_dir = evaluated(tmp_path, file, "judge.votes=[1,2,3]")
    found = results.collect(config, run_dir, {})["judgebench"]
    assert (found["mode"], found["n_pairs"]) == ("pointwise", 10)
    overall = found["critics"]["base"]["overall"]
    # of three votes on each answer the third is wrong on both: 2 of 3 single votes, the one pair of votes, all three
    assert overall["accuracy"] == {"1": pytest.approx(2 / 3), "2": 1.0, "3": 1.0}
    assert overall["ci95"]["2"] == [1.0, 1.0]
    assert found["critics"]["base"]["coding"]["n_pairs"] == 2
    votes = jsonl.read(Votes, judging.votes_file(run_dir, "base"))
    assert votes[0].first == ("correct", "correct", "incorrect")


def test_a_habit_of_places_is_found_out_by_swapping(tmp_path, file):
    config, run_dir = evaluated(tmp_path, file, "judge.votes=[1,4]", "judge.mode=pairwise")
    accuracy = results.collect(config, run_dir, {})["judgebench"]["critics"]["base"]["overall"]["accuracy"]
    # every second vote says A: with both orders those cancel and the others decide
    assert accuracy == {"1": pytest.approx(0.75), "4": 1.0}
    (tmp_path / "apart").mkdir()
    config, run_dir = evaluated(tmp_path / "apart", file, "judge.votes=[4]", "judge.mode=pairwise", "judge.swap=false")
    accuracy = results.collect(config, run_dir, {})["judgebench"]["critics"]["base"]["overall"]["accuracy"]
    assert accuracy == {"4": 0.5}


def test_the_report_of_judgebench_alone(tmp_path, file):
    config, run_dir = evaluated(tmp_path, file, "judge.votes=[1,2,3]")
    written = page.write(config, run_dir)
    assert page.metrics(written) == {"eval/judgebench/base/accuracy": 1.0}
