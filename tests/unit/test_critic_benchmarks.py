"""Benchmarks of critics: rows as published, read by ``datasets``; their own scorers' formulas, worked by hand."""

import json

import pytest
from datasets import Dataset
from test_serve_judge import Scripted, critic_of, serving

from ctrl_hpc import cli
from ctrl_hpc.commands.bench_critic import lines
from ctrl_hpc.data.critic_benchmarks import load
from ctrl_hpc.evaluate.critic_benchmarks import (
    Judged,
    best_of,
    both_orders,
    correct_or_not,
    normalised_helpfulness,
    numbers,
    one_decision,
    position_bias,
    stopped,
    ties,
)
from ctrl_hpc.judge.server import Judge
from ctrl_hpc.records import LabelledAnswers

PAIR = {"question_id": "q1", "question_content": "Add.", "pos_response": "good", "neg_response": "bad"}


def published(folder, files):
    """A folder laid out as the hub's repositories: parquet files, and a README that names them.

    ``files``: rows by ``CONFIG/SPLIT``.
    """
    configs = {}
    for place, rows in files.items():
        config, split = place.split("/")
        file = f"{config}/{split}-00000-of-00001.parquet"
        (folder / config).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / file)
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {file}\n")
    named = "".join(f"- config_name: {name}\n  data_files:\n{''.join(places)}" for name, places in configs.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{named}---\n")
    return str(folder)


def test_codejudgebench_as_published(tmp_path):
    common = {"difficulty": "hard", "platform": "leetcode", "starter_code": "class Solution:"}
    meta = {"error_code": -2, "inputs": "1", "output": "2", "expected": "3"}
    place = published(
        tmp_path,
        {
            "codegen/claude_3.7_sonnet": [PAIR | common, PAIR | common | {"question_content": "Divide."}],
            "coderepair/claude_3.7_sonnet": [PAIR | common | {"wrong_code": "print(2)", "wrong_meta": meta}],
            "testgen/claude_3.7_sonnet": [PAIR | common | {"pos_input": "1 2", "neg_input": "1 1"}],
        },
    )
    first, second = load("codejudgebench", place)
    assert (first.answers, first.worth, first.category) == (("good", "bad"), (1.0, 0.0), "hard")
    assert (first.id, second.id, second.question) == ("q1#0", "q1#1", "Divide.") and first.is_pair
    (repair,) = load("codejudgebench", place, "coderepair/claude_3.7_sonnet")
    assert repair.question == (
        "You are provided with a coding question, a piece of code, and the associated error message. \n"
        "You need to generate a corrected version of the code.\n\n### Question\nAdd.\n\n"
        "### Program to be fixed:\n```python\nprint(2)\n```\n\n\n### Error Information:\n"
        "The above code is incorrect and got a wrong answer.\nInput:\n1\n\nGenerated Output:\n2\n\nExpected:\n3"
    )
    (test,) = load("codejudgebench", place, "testgen/claude_3.7_sonnet")
    assert test.answers[1] == "### Test Input\n```\n1 1\n```\n\n### Test Output\n```\nbad\n```"


def test_codecriticbench_as_published(tmp_path):
    """One JSON line an answer, in the file of the hub; a label that is none is left out and named."""
    row = {
        "source": "mbpp",
        "question": "Add.",
        "answer": "print(3)",
        "correctness": "Correct",
        "difficulty": "Easy",
        "subset": "mbpp",
        "public_test": {"input": ["assert True"]},
        "checklist_dimensions": ["Correctness Verification"],
        "checklists": ["Is it right?"],
        "checklist_scores": [9],
        "score": 9,
    }
    rows = [
        row,
        row | {"correctness": "Error", "source": "stackoverflow", "subset": "Databases"},
        row | {"correctness": "?"},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("A data set.\n")
    file = tmp_path / "data" / "CodeCriticBench.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in rows))
    for place in (tmp_path, file):
        first, second = load("codecriticbench", str(place))
        assert (first.answers, first.worth, first.category) == (("print(3)",), (1.0,), "mbpp")
        assert (second.worth, second.category) == ((0.0,), "Databases")


def test_rewardbench2_as_published(tmp_path):
    row = {
        "id": "17",
        "prompt": "Add.",
        "chosen": ["right"],
        "rejected": ["a", "b", "c"],
        "num_correct": 1,
        "num_incorrect": 3,
        "total_completions": 4,
        "models": ["m"] * 4,
        "subset": "Math",
        "additional_metadata": None,
    }
    place = published(tmp_path, {"default/test": [row, row | {"id": "tied:1", "subset": "Ties", "chosen": ["x", "y"]}]})
    first, second = load("rewardbench2", place)
    assert (first.id, first.category, first.worth) == ("17", "Math", (1.0, 0.0, 0.0, 0.0))
    assert (second.id, second.answers[:3], second.worth[:3]) == ("tied:1", ("x", "y", "a"), (1.0, 1.0, 0.0))


def test_jetts_judgebench_and_ones_own(tmp_path):
    response = {"content": "print(3)", "metadata": {"score": 0.25, "model": "m"}}
    file = tmp_path / "mbpp_llama8b.jsonl"
    query = {"content": "Add.", "metadata": {"dataset": "mbpp"}}
    file.write_text(json.dumps({"query": query, "responses": [response, response | {"metadata": {"score": 1}}]}) + "\n")
    (item,) = load("jetts", str(file))
    assert (item.question, item.category, item.worth, item.is_binary) == ("Add.", "mbpp", (0.25, 1.0), False)
    row = {"pair_id": "p", "source": "ours", "label": "B>A", "question": "?", "response_A": "a", "response_B": "b"}
    file.write_text(json.dumps(row) + "\n")
    (item,) = load("judgebench", str(file), "gpt")
    assert (item.id, item.worth) == ("p", (0.0, 1.0))
    lines = [
        {"question": "?", "answers": ["a", "b"], "right": [False, True], "category": "own"},
        {"id": 7, "question": "?", "answer": "a", "right": True},
        {"question": "?", "answers": ["a", "b"], "worth": [0.5]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = load("own", str(file))
    assert (first.worth, first.category, second.worth, second.id) == ((0.0, 1.0), "own", (1.0,), "7#1")


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("mtbench", None, "'mtbench' is no benchmark of critics; allowed: codejudgebench, codecriticbench"),
        ("jetts", None, "jetts: its path is missing; it is read from a file"),
        ("own", "nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name, path, told):
    with pytest.raises(ValueError, match=told):
        load(name, path)


def question(*worth, name="q", category="c"):
    answers = tuple(f"answer {index}" for index in range(len(worth)))
    return LabelledAnswers(id=name, category=category, question="?", answers=answers, worth=worth)


def judged(*probabilities, votes=(), agreements=None):
    words = {None: None, True: "correct", False: "incorrect"}
    said = tuple(words[None if value is None else value > 0.5] for value in probabilities)
    agreements = agreements or tuple(None if value is None else 1.0 for value in probabilities)
    return Judged(id="q", probabilities=probabilities, judgements=said, agreements=agreements, votes=votes)


def test_best_of_n_is_rewardbenchs_score_of_one_right_answer():
    """Its ``results``: 1 over the number of highest scores where the first, the right one, is among them, else 0."""
    right_first = (1.0, 0.0, 0.0, 0.0)
    assert best_of([0.9, 0.1, 0.2, 0.3], right_first) == 1.0
    assert best_of([0.9, 0.9, 0.2, 0.9], right_first) == pytest.approx(1 / 3)
    assert best_of([0.8, 0.9, 0.2, 0.3], right_first) == 0.0
    assert best_of([0.5, 0.5], (0.25, 1.0)) == 0.625  # JETTS: what chance among its highest is worth


def test_rewardbenchs_score_of_ties_worked_by_hand():
    items = [
        # gap 1/2 of the tied, spread 1/4, gap 1/4 of the ref: preferred, but not by the ref's gap; tanh(1 - 1) = 0
        (question(1.0, 1.0, 0.0, name="tied:0"), judged(1.0, 0.75, 0.25)),
        (question(1.0, 0.0, name="ref:0"), judged(0.75, 0.5)),
        # a wrong one is above; both right ones are equal: tanh(-1/4 / 0) = -1
        (question(1.0, 1.0, 0.0, name="tied:1"), judged(0.5, 0.5, 0.75)),
        (question(1.0, 0.0, name="ref:1"), judged(1.0, 0.0)),
    ]
    assert ties(items) == pytest.approx(0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * -0.5)
    with pytest.raises(ValueError, match="Ties have ids ref:N and tied:N"):
        ties([(question(1.0, 0.0, name="17"), judged(1.0, 0.0))])


def test_rewardbench_is_the_mean_of_its_subsets():
    questions = [question(1.0, 0.0, 0.0, 0.0, category="Math")] * 3 + [question(1.0, 0.0, 0.0, 0.0, category="Focus")]
    said = [judged(0.9, 0.1, 0.1, 0.1), judged(0.9, 0.9, 0.1, 0.1), judged(None, 0.1, 0.1, 0.1)]
    found = numbers("rewardbench2", questions, [*said, judged(None, None, None, None)], bootstrap=50)
    assert found["categories"]["Math"]["score"] == pytest.approx(1.5 / 3)
    assert found["categories"]["Focus"]["score"] == 0.25 and found["score"] == pytest.approx(0.375)


def test_the_scores_of_pairs():
    pair = question(1.0, 0.0)
    votes = ("A", "B", None, "A")
    assert both_orders(pair, judged(0.5, 0.5, votes=votes)) == 0.5  # CodeJudgeBench: pred == label, no label is wrong
    assert one_decision(pair, judged(0.5, 0.5, votes=votes)) == 1.0  # JudgeBench: both orders decide together
    assert one_decision(pair, judged(0.5, 0.5, votes=("A", "B"))) == 0.0
    assert one_decision(question(0.0, 1.0), judged(0.2, 0.3)) == 1.0 and both_orders(pair, judged(0.5, 0.5)) == 0.5
    # first places: A in order, B swapped; 1st, 2nd and of the second pair none of the one vote that names one
    assert position_bias([judged(0.5, 0.5, votes=votes)]) == {"first_place": pytest.approx(2 / 3), "consistent": 0.0}
    assert position_bias([judged(0.5, 0.5, votes=("A", "A"))]) == {"first_place": 0.5, "consistent": 1.0}


def test_normalised_helpfulness_is_between_the_greedy_answers_and_the_best():
    """Two questions; greedy answers are worth 0 and 1/2, the best 1 and 1, the ones that the judge takes 1 and 1/4."""
    questions = [question(0.0, 1.0, 0.5), question(0.5, 0.25, 1.0)]
    said = [judged(0.1, 0.9, 0.2), judged(0.1, 0.9, 0.2)]
    assert normalised_helpfulness(list(zip(questions, said, strict=True))) == pytest.approx(
        (0.625 - 0.25) / (1.0 - 0.25)
    )
    greedy = [judged(0.9, 0.1, 0.2)] * 2
    assert normalised_helpfulness(list(zip(questions, greedy, strict=True))) == 0.0
    assert normalised_helpfulness([(question(1.0, 0.0), judged(0.9, 0.1))]) is None
    found = numbers("jetts", questions, said, bootstrap=10)
    assert found["normalised_helpfulness"] == 0.5 and found["score"] == 0.625
    assert "normalised helpfulness: 50.0 % (0: the greedy answers)" in lines(found)
    assert "normalised_helpfulness" not in numbers("own", questions, said, bootstrap=10)


def test_codecriticbench_takes_silence_for_error():
    assert [correct_or_not(question(1.0), judged(value)) for value in (0.9, 0.1, None)] == [1.0, 0.0, 0.0]
    assert [correct_or_not(question(0.0), judged(value)) for value in (0.9, 0.1, None)] == [0.0, 1.0, 1.0]


def test_stopping_at_the_first_that_is_judged_correct():
    assert stopped(judged(0.1, 0.9, 0.9), (0.0, 1.0, 0.0)) == (1.0, 2)
    assert stopped(judged(0.1, None, 0.2), (0.0, 1.0, 0.5)) == (0.5, 3)


def test_all_numbers_of_a_benchmark_worked_by_hand():
    questions = [question(1.0, 0.0, category="x"), question(1.0, category="x"), question(0.0, 0.0, 1.0, category="y")]
    said = [judged(0.9, 0.7), judged(None), judged(0.2, 0.9, 0.8, agreements=(1.0, 0.6, 0.8))]
    found = numbers("own", questions, said, bootstrap=200)
    assert found["score"] == pytest.approx((1 + 0 + 0) / 3) and found["ci95"][0] <= found["score"] <= found["ci95"][1]
    assert found["categories"]["x"]["score"] == 0.5 and found["categories"]["y"]["n"] == 1
    answers = found["answers"]
    # right: 0.9 c, None, 0.8 c; wrong: 0.7 c, 0.2 i, 0.9 c
    assert answers["accuracy"] == pytest.approx(3 / 6) and answers["abstention"] == pytest.approx(1 / 6)
    assert answers["f1_pass"] == pytest.approx(2 * 2 / (4 + 3)) and answers["f1_fail"] == pytest.approx(2 / (1 + 3))
    assert answers["agreement"] == pytest.approx((1 + 1 + 1 + 0.6 + 0.8) / 5)
    # bins of a tenth: 0.9 and 0.9, one right; 0.8 right; 0.7 wrong; 0.2 wrong
    assert answers["calibration"]["ece"] == pytest.approx((2 * 0.4 + 0.2 + 0.7 + 0.2) / 5)
    assert found["questions"]["best_of_n"] == 0.5 and found["questions"]["oracle"] == 1.0
    assert found["questions"]["random"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["questions"]["stopping"] == {"worth": 0.5, "answers": 1.5}


def test_a_served_critic_on_pairs_of_ones_own(tmp_path, capsys):
    """The whole command: a critic that sees what is good, but whose second vote prefers the first place."""

    def say(text, j):
        if "broken" in text:
            raise ValueError("too long")
        if "<answer-a>" in text:
            return f"Better answer: {'A' if 'good' in text.split('</answer-a>')[0] or j else 'B'}"
        return f"Overall judgment: {'Correct' if 'good' in text.split('<answer>')[1] else 'Incorrect'}"

    file = tmp_path / "own.jsonl"
    rows = [{"question": f"{k}", "answers": ["good", "bad"], "right": [True, False]} for k in range(3)]
    rows.append({"question": "?", "answer": "broken", "right": False})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["bench", "critic", "own", "--path", str(file), "--mode", "pairwise", "--votes", "4"]
    with serving(Judge(critic_of(Scripted(say), "default"), "", None, None)) as url:
        assert cli.main([*command, "--judge", url, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["score"] == 1.0 and found["errors"] == 1 and found["answers"]["abstention"] == pytest.approx(1 / 7)
    assert found["position"] == {"first_place": 0.75, "consistent": 0.5}
    assert "position: first place 75.0 % of decided votes, same answer in both orders 50.0 %" in told
    assert "own: 100.0 % [100.0 %, 100.0 %] of 4 questions" in told and "1 could not be judged" in told
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 0
    assert len((tmp_path / "out" / "judged.jsonl").read_text().splitlines()) == 4
    assert cli.main([*command, "--judge", "http://127.0.0.1:9", "--out", str(tmp_path / "out2")]) == 2
    assert "http://127.0.0.1:9: cannot be asked" in capsys.readouterr().err
