"""The critic as a service: probabilities from the judgement's tokens, calibration, cache, and the trainers that ask."""

import asyncio
import contextlib
import dataclasses
import inspect
import json
import math
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from transformers import AutoTokenizer

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT
from ctrl_hpc.evaluate.calibration import (
    Calibration,
    brier,
    expected_calibration_error,
    fit,
    held_out,
    reliability,
)
from ctrl_hpc.flow.comparison import comparison_template
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.judge import server
from ctrl_hpc.judge.opinions import (
    Critic,
    How,
    Item,
    LocalCritic,
    Opinion,
    right_one,
    score,
)
from ctrl_hpc.judge.server import Judge, Options, create_app, load_critic
from ctrl_hpc.records import CLOSE_ROOM, Generation, Sampling, Solution
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.confidence import verdict_place, verdict_probability
from ctrl_hpc.rollout.decoding import Completion
from ctrl_hpc.service.http import listen
from ctrl_hpc.tiny import world

TINY = str(ROOT / "models" / "tiny" / "critic")
PROBLEMS = world.load()["test"]


def others(**probabilities):
    return [(name.replace("_", " "), math.log(value)) for name, value in probabilities.items()]


@pytest.mark.parametrize(
    ("token", "place", "found", "share"),
    [
        (" Correct", 1, others(_Correct=0.6, _Incorrect=0.2, _In=0.1, Hm=0.1), 0.6 / 0.9),
        ("Correct", 0, others(Correct=0.5, In=0.25, _In=0.1), 0.5 / 0.85),
        (
            " judgment: Correct",
            11,
            [(" judgment: Correct", math.log(0.7)), (" judgment: Incorrect", math.log(0.3))],
            0.7,
        ),
        (" Correct.", 1, [(" Correct.", math.log(0.8)), (" Correct", math.log(0.1)), (" Inc", math.log(0.1))], 0.9),
        ("Correct", 0, others(Correct=0.9, Hm=0.1), 1 / 1.0001),  # the other verdict is unlikely, not impossible
    ],
)
def test_a_verdicts_share_of_both_verdicts(token, place, found, share):
    assert verdict_probability("x" * 7, token, found, "correct", 7 + place) == pytest.approx(share)


def test_where_a_verdict_begins():
    text = "Incorrect?\nIt is not correct.\nOverall judgment: **Incorrect**, as it is incorrect."
    assert text[verdict_place(text, "incorrect") :].startswith("Incorrect**")
    assert verdict_place("so: incorrect, yes incorrect", "incorrect") == 19
    assert verdict_place("incorrect", "correct") is None


def opinion(judgement, probability):
    return Opinion(text="", judgement=judgement, probability=probability)


def test_what_opinions_come_to():
    found = score([opinion("correct", 0.9), opinion("incorrect", 0.3), opinion("correct", 0.6), opinion(None, None)])
    assert found.raw == found.probability == pytest.approx(0.6)
    assert (found.judgement, found.votes) == ("correct", {"correct": 2, "incorrect": 1, "none": 1})
    assert found.agreement == pytest.approx(2 / 3)
    silent = score([opinion(None, None)], lambda raw: 1.0)
    assert (silent.raw, silent.probability, silent.judgement, silent.agreement) == (None,) * 4
    assert score([opinion("correct", 0.9)], lambda raw: raw / 2).probability == pytest.approx(0.45)
    assert right_one(0.8, 0.4) == pytest.approx(0.48 / (0.48 + 0.08))
    assert right_one(1.0, 1.0) == 0.5 and right_one(None, 0.1) is None


def test_calibration_error_worked_by_hand():
    probabilities, right = [0.05, 0.15, 0.95, 0.85, 1.0, 0.95], [False, True, True, False, True, False]
    bars = [(item.low, item.n, item.confidence, item.accuracy) for item in reliability(probabilities, right)]
    assert bars[0] == (0.0, 1, 0.05, 0.0) and bars[-1][:2] == (0.9, 3)
    assert bars[-1][2:] == (pytest.approx(2.9 / 3), pytest.approx(2 / 3))
    assert expected_calibration_error(probabilities, right) == pytest.approx((0.05 + 0.85 + 0.85 + 0.9) / 6)
    assert brier([0.5, 0.0], [True, False]) == 0.125


def test_isotonic_pools_what_falls():
    found = fit("isotonic", [0.1, 0.2, 0.3, 0.4], [False, True, False, True])
    found = [found(value) for value in (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 1.0)]
    assert found == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0.75, 1, 1])


def test_platt_meets_its_targets_where_two_points_decide():
    """Two values of the critic, two parameters: each group's mean of Platt's targets (5/6 and 1/6) is met."""
    probabilities, right = [0.2] * 4 + [0.8] * 4, [True, False, False, False, True, True, True, False]
    found = fit("platt", probabilities, right)
    assert (found(0.2), found(0.8)) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found(0.0) < found(0.2) < found(0.5) < found(1.0)
    with pytest.raises(ValueError, match="8 answers of which 8 are right; both kinds are needed"):
        fit("platt", probabilities, [True] * 8)
    with pytest.raises(ValueError, match="'x' is no way to calibrate; allowed: platt, isotonic"):
        fit("x", probabilities, right)


def test_held_out_calibration_does_not_see_its_own_answer():
    probabilities, right = [0.2, 0.8] * 5, [False, True] * 4 + [True, True]
    found = held_out("platt", probabilities, right)
    others = [row for row in range(10) if row not in (0, 1, 9)]  # the first and sixth right one, the first wrong one
    without = fit("platt", [probabilities[row] for row in others], [right[row] for row in others])
    assert found is not None and [found[row] for row in (0, 1, 9)] == [without(0.2), without(0.8), without(0.8)]


def test_folds_hold_both_kinds_in_whatever_order_answers_come():
    """Five answers a problem, the right one first: positions modulo five would leave the first fold's map none."""
    right = [number % 5 == 0 for number in range(50)]
    found = held_out("platt", [0.9 if label else 0.2 for label in right], right)
    assert found is not None and min(found[::5]) > 0.5 > max(found[1::5])
    assert held_out("platt", [0.9, 0.1, 0.2], [True, False, False]) is None
    assert held_out("platt", [0.9, 0.8, 0.1, 0.2], [True, True, False, False]) is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "method: missing"),
        ('{"method": "isotonic", "n": 1}', "isotonic with 0 knots"),
        ("nothing", "is no calibration"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_calibration_is_one_line(tmp_path, text, told):
    file = tmp_path / "calibration.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        Calibration.load(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@contextlib.contextmanager
def serving(judge):
    """The URL of a judge in a thread of this process."""
    app = create_app(judge)
    ready = threading.Event()
    app.router.on_startup.append(ready.set)
    instance = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=instance.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        instance.should_exit = True
        thread.join()
        judge.close()
        sock.close()


def critic_of(generator, prompts="tiny"):
    return Critic(generator=generator, prompts=Prompts.load(prompts), comparison=comparison_template(None))


@pytest.fixture(scope="module")
def tiny():
    """The miniature's base critic in this process."""
    generator, end = load_critic(Options(model=TINY, threads=1))
    yield generator
    end()


@pytest.fixture(scope="module")
def url(tiny):
    with serving(Judge(critic_of(tiny), "tiny", None, None)) as address:
        yield address


def asked(url, route, items, **body):
    answer = httpx.post(url + route, json={"items": items} | body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def item(number, program=None):
    problem = PROBLEMS[number]
    return {"problem": problem.prompt, "answer": f"```python\n{program or problem.canonical_solution}\n```"}


def test_a_score_is_what_the_models_own_logits_say(url, tiny):
    """Against a plain forward pass: the verdicts' probabilities where the critique says one."""
    (critique,), (found,) = asked(url, "/critique", [item(0)]), asked(url, "/score", [item(0)])
    (said,) = critique["critiques"]
    assert said["text"].endswith("Overall judgment: Correct") and said["judgement"] == "correct"
    problem = PROBLEMS[0]
    solution = Solution(id="", problem_id="", text=item(0)["answer"], program=problem.canonical_solution)
    ids = chat_ids(tiny.tokenizer, Prompts.load("tiny").critique(problem, solution))
    ids += tiny.tokenizer(said["text"].removesuffix(" Correct"), add_special_tokens=False)["input_ids"]
    words = [tiny.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in ("Correct", "Incorrect")]
    assert [len(word) for word in words] == [1, 1]
    with torch.inference_mode():
        logits = tiny.worker.engine.model(torch.tensor([ids])).logits[0, -1, [word[0] for word in words]].double()
    share = torch.softmax(logits, 0)[0].item()
    # the other verdict is never told to be less likely than a ten-thousandth
    assert found["raw"] == pytest.approx(min(share, 1 / 1.0001), abs=1e-5)
    assert found["probability"] == found["raw"] == said["probability"]


def test_a_critique_that_ends_without_a_judgement_is_asked_for_one(tiny):
    """Cut off before its judgement, and continued after the words that ask for one: the same token is read."""
    prompts = Prompts.load("tiny", critique_close="Overall judgment:")
    critic = Critic(generator=tiny, prompts=prompts, comparison=comparison_template(None))
    asked = Item(**item(0))
    (whole,) = critic_of(tiny).opinions(asked, How(max_tokens=64))
    (found,) = critic.opinions(asked, How(max_tokens=CLOSE_ROOM + 6))
    assert whole.text.split("Improvement")[0].startswith(found.text.split("\n\n")[0])
    assert found.text.split("\n\n")[1].startswith("Overall judgment:") and found.judgement is not None
    (cut,) = critic_of(tiny).opinions(asked, How(max_tokens=6))
    assert (cut.judgement, cut.probability) == (None, None)
    generation = tiny.complete(
        [prompts.critique(PROBLEMS[0], Solution(id="", problem_id="", text="", program=""))],
        Sampling(temperature=0.0, max_tokens=6),
    )[0][0]
    (longer,) = tiny.extend([()], [generation], "\n\nOverall judgment:", [Sampling(temperature=0.0, max_tokens=32)])
    start, end = longer.forced
    assert longer.token_ids[:start] == generation.token_ids and longer.top_logprobs[start:end] == ((),) * (end - start)
    assert 0 < found.probability < 1  # by the tokens, not by the vote


class Spoken:
    """A worker whose model says given texts, each token likely, and the other verdict a third as likely."""

    alive = True

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.asked = tokenizer, list(texts), []
        (right,), (wrong,) = (self.ids(f" {word}") for word in ("Correct", "Incorrect"))
        self.other = {right: wrong, wrong: right}

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def submit(self, prompts, how):
        self.asked += how
        done = Future()
        said = [(prompt, self.ids(self.texts.pop(0))) for prompt in prompts]
        done.set_result(
            [
                Completion(
                    text="",
                    prompt_ids=tuple(prompt),
                    token_ids=tuple(ids),
                    logprobs=tuple(0.0 for _ in ids),
                    top_logprobs=tuple(
                        ((token, math.log(0.6)), (self.other.get(token, 0), math.log(0.2))) for token in ids
                    ),
                )
                for prompt, ids in said
            ]
        )
        return done


THOUGHT = "It may be right.\nOverall judgment: Correct\n</think>\n\n"


@pytest.fixture
def thinking_tokenizer():
    """Of a model whose template opens a thought."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert "<think>" in tokenizer.chat_template
    return tokenizer


def test_a_thought_reaches_neither_critique_nor_judgement_nor_score(thinking_tokenizer):
    said = (f"{THOUGHT}No, it is off.\nOverall judgment: Incorrect", "Is it?\nOverall judgment: Correct")
    worker = Spoken(thinking_tokenizer, *said)
    ended, cut = critic_of(LocalCritic(worker, thinking_tokenizer)).opinions(Item(**item(0)), How(votes=2))
    assert (ended.text, ended.judgement) == ("No, it is off.\nOverall judgment: Incorrect", "incorrect")
    assert ended.probability == pytest.approx(0.25)
    assert (cut.text, cut.judgement, cut.probability) == ("", None, None)  # a thought without an end


def test_after_a_thought_a_judgement_is_asked_for_and_its_token_read(thinking_tokenizer):
    worker = Spoken(thinking_tokenizer, f"{THOUGHT}No, it is off.", " Incorrect")
    prompts = Prompts.load("tiny", critique_close="Overall judgment:")
    critic = Critic(generator=LocalCritic(worker, thinking_tokenizer), prompts=prompts, comparison=None)
    (found,) = critic.opinions(Item(**item(0)), How())
    assert found.text == "No, it is off.\n\nOverall judgment: Incorrect" and found.judgement == "incorrect"
    assert found.probability == pytest.approx(0.25)


def test_closing_words_that_leave_no_room_are_refused(thinking_tokenizer, capsys):
    worker = Spoken(thinking_tokenizer, f"{THOUGHT}No.")
    words = "Say at last, and in one of the two words that you were told of, what you think of all this"
    prompts = Prompts.load("tiny", critique_close=words)
    critic = Critic(generator=LocalCritic(worker, thinking_tokenizer), prompts=prompts, comparison=None)
    with pytest.raises(ValueError, match=r"has \d\d tokens; it may have 31"):
        critic.opinions(Item(**item(0)), How())
    assert len(worker.asked) == 1
    served = ["serve", "judge", "--port", "0", "--model", TINY, "--prompts", "tiny", "--critique-close", words]
    assert cli.main(served) == 2
    error = capsys.readouterr().err
    assert "--critique-close: has " in error and "at most 31" in error and error.count("\n") == 1


def test_what_was_asked_is_not_asked_again_and_company_shares_a_batch(tiny, monkeypatch):
    batches, generate = [], tiny.worker.engine.generate
    monkeypatch.setattr(
        tiny.worker.engine, "generate", lambda prompts, *rest: batches.append(len(prompts)) or generate(prompts, *rest)
    )
    with serving(Judge(critic_of(tiny), "tiny", None, None)) as url:
        items = [item(number) for number in range(8)]
        first = asked(url, "/score", [*items, *items])
        assert sum(batches) == 8 and len(batches) < 8
        assert first[:8] == first[8:] == asked(url, "/score", items)
        assert sum(batches) == 8
        assert asked(url, "/score", items[:1], votes=3)[0]["votes"]["none"] <= 3
        assert sum(batches) == 11
        metrics = httpx.get(f"{url}/metrics").text
    assert "ctrl_judge_items_total 25\n" in metrics and "ctrl_judge_cached_total 16\n" in metrics


class Scripted:
    """A critic that says what it is told to, or fails."""

    def __init__(self, say):
        self.say, self.asked = say, 0

    def complete(self, chats, sampling):
        self.asked += 1
        return [[Generation(text=self.say(chat[-1].content, j)) for j in range(sampling.n)] for chat in chats]


def test_answers_kept_on_disk_outlive_the_service(tmp_path):
    critic = Scripted(lambda text, j: "Overall judgment: Correct")
    for _ in range(2):
        with serving(Judge(critic_of(critic), "one", None, tmp_path)) as url:
            assert asked(url, "/score", [item(0)])[0]["raw"] == 1.0
    assert critic.asked == 1
    with serving(Judge(critic_of(critic), "other weights", None, tmp_path)) as url:
        asked(url, "/score", [item(0)])
    assert critic.asked == 2


def test_a_lost_disk_costs_the_cache_not_the_judgements(tmp_path, caplog):
    critic = Scripted(lambda text, j: "Overall judgment: Correct")
    (tmp_path / "cache").write_text("a file")
    with serving(Judge(critic_of(critic), "", None, tmp_path / "cache")) as url:
        results = asked(url, "/score", [item(0), item(1)])
        assert [result["raw"] for result in results] == [1.0, 1.0]
        assert asked(url, "/score", [item(0)])[0]["raw"] == 1.0 and critic.asked == 2
    assert [record.message.split(":")[0] for record in caplog.records] == ["the judge's cache fails"]


@pytest.mark.parametrize(
    ("folder", "told"), [("a file", "File exists"), ("a file/inside", "Not a directory"), ("/proc/kept", "")]
)
def test_a_cache_that_cannot_be_is_one_line(tmp_path, capsys, folder, told):
    (tmp_path / "a file").write_text("")
    place = str(tmp_path / folder)
    assert cli.main(["serve", "judge", "--model", TINY, "--port", "0", "--cache", place]) == 2
    error = capsys.readouterr().err
    assert f"--cache {place}: is no folder that can be written: {told}" in error and error.count("\n") == 1


def test_a_fault_costs_its_item_alone(caplog):
    def faulty(text, j):
        if "bad" in text:
            raise ConnectionResetError("gone")
        return "Overall judgment: Correct"

    with serving(Judge(critic_of(Scripted(faulty)), "", None, None)) as url:
        first, second = asked(url, "/score", [{"problem": "bad", "answer": "x"}, item(0)])
    assert first == {"error": "ConnectionResetError: gone"} and second["raw"] == 1.0
    assert "an item cannot be judged" in caplog.text


def test_one_bad_item_loses_nothing_and_is_asked_anew(url):
    def moody(text, j):
        if "bad" in text and critic.asked < 4:
            raise ValueError("prompt 0 has 9999 tokens; the model has 512 positions")
        return "Overall judgment: Incorrect"

    critic = Scripted(moody)
    items = [item(0), {"problem": "bad", "answer": "x"}, item(1)]
    with serving(Judge(critic_of(critic), "", None, None)) as other:
        results = asked(other, "/score", items)
        assert [result.get("raw") for result in results] == [0.0, None, 0.0]
        assert results[1] == {"error": "prompt 0 has 9999 tokens; the model has 512 positions"}
        assert asked(other, "/score", items)[1]["raw"] == 0.0
    refused = httpx.post(f"{url}/score", json={"items": [item(0) | {"code": "x"}]})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400,
        "items.0.code: Extra inputs are not permitted",
    )
    assert httpx.post(f"{url}/score", json={"items": [], "votes": 0}).status_code == 400


def test_a_dead_model_thread_is_not_healthy():
    critic = LocalCritic(SimpleNamespace(alive=False), None)
    with serving(Judge(critic_of(critic), "", None, None)) as url:
        assert httpx.get(f"{url}/health").status_code == 503


def test_two_answers_are_compared_apart_or_side_by_side():
    def prefers_good(text, j):
        if "<answer-a>" in text:
            return f"Better answer: {'A' if 'good' in text.split('</answer-a>')[0] or j else 'B'}"
        return f"Overall judgment: {'Correct' if 'good' in text.split('<answer>')[1] else 'Incorrect'}"

    pairs = [
        {"problem": "?", "answer_a": "good", "answer_b": "bad"},
        {"problem": "?", "answer_a": "bad", "answer_b": "bad"},
    ]
    with serving(Judge(critic_of(Scripted(prefers_good), "default"), "", None, None)) as url:
        apart = asked(url, "/compare", pairs)
        assert [(result["better"], result["probability_a"]) for result in apart] == [("A", 1.0), (None, 0.5)]
        (beside,) = asked(url, "/compare", pairs[:1], mode="pairwise", votes=4)
    # of two votes in each order the second says A whatever stands there
    assert beside == {"better": "A", "probability_a": 0.75, "votes": ["A", "A", "A", "B"]}


def test_a_development_set_makes_the_probabilities_honest(tmp_path, capsys):
    """A critic that is right in three of four: 1 and 0 become what that is worth."""
    critic = Scripted(lambda text, j: f"Overall judgment: {'Correct' if 'yes' in text else 'Incorrect'}")
    rows = [
        {
            "problem": f"{number}",
            "answer": "yes" if number % 2 else "no",
            "right": (number % 2 == 1) != (number % 4 == 0),
        }
        for number in range(40)
    ]
    dev, out = tmp_path / "dev.jsonl", tmp_path / "calibration.json"
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(Judge(critic_of(critic, "default"), "", None, None)) as url:
        assert cli.main(["calibrate", url, str(dev), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "40 answers judged, 30 of them right; 0 without a judgement" in told
    assert "as the critic says: ECE 0.2500, Brier score 0.2500" in told
    found = Calibration.load(out)
    # even numbers are said to be wrong, and half of them are right: Platt's targets are 31/32 and 1/12
    assert found(0.0) == pytest.approx((31 / 32 + 1 / 12) / 2)
    assert found(1.0) == pytest.approx(31 / 32)
    with serving(Judge(critic_of(critic, "default"), "", found, None)) as url:
        (result,) = asked(url, "/score", [{"problem": "1", "answer": "yes"}])
    assert (result["raw"], result["probability"]) == (1.0, pytest.approx(31 / 32))
    with serving(Judge(critic_of(critic, "default"), "", None, None)) as url:
        dev.write_text("".join(json.dumps(row | {"right": row is rows[0]}) + "\n" for row in rows[:10]))
        assert cli.main(["calibrate", url, str(dev), "--out", str(tmp_path / "one.json")]) == 0
    assert (
        "platt, held out: not possible" in capsys.readouterr().out and Calibration.load(tmp_path / "one.json").n == 10
    )
    dev.write_text("".join(json.dumps(row | {"right": True}) + "\n" for row in rows))
    assert cli.main(["calibrate", "http://127.0.0.1:9", str(dev), "--out", str(out)]) == 2
    assert "40 answers of which 40 are right; both kinds are needed" in capsys.readouterr().err
    dev.write_text(json.dumps(rows[0]) + "\n")
    assert cli.main(["calibrate", "http://127.0.0.1:9", str(dev), "--out", str(out)]) == 2
    assert "1 answers; at least 10 are needed" in capsys.readouterr().err


def adapter(framework):
    """The code that docs/judge.md gives for a trainer, run."""
    page = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"^\*\*{framework}\*\*.*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, framework, "exec"), names)
    return names


@pytest.fixture
def judged(url, monkeypatch):
    """The judge's address in the environment; the problem, and a right and a wrong answer with their probabilities."""
    monkeypatch.setenv("JUDGE_URL", url)
    answers = [item(0)["answer"], item(0, "print(0)")["answer"]]
    found = asked(url, "/score", [{"problem": PROBLEMS[0].prompt, "answer": answer} for answer in answers])
    probabilities = [result["probability"] or 0.0 for result in found]
    assert probabilities[0] > probabilities[1]
    return PROBLEMS[0].prompt, answers, probabilities


def test_verl_asks_for_a_reward(judged):
    """As verl's reward managers do: by name, in a thread of an executor, one answer at a time."""
    problem, answers, probabilities = judged
    compute_score = adapter("verl")["compute_score"]
    assert not inspect.iscoroutinefunction(compute_score)
    extra = {"question": problem, "index": 0, "num_turns": 2}
    found = [
        compute_score(data_source="ours", solution_str=answer, ground_truth="", extra_info=extra) for answer in answers
    ]
    assert [result["score"] for result in found] == probabilities and found[0]["judged"] == 1.0
    routed = {"reward_router_address": None, "reward_model_tokenizer": None}
    assert (
        compute_score(data_source="ours", solution_str=answers[0], ground_truth="", extra_info=extra, **routed)
        == found[0]
    )


def test_slime_asks_for_a_reward(judged):
    """As slime's rm_hub does: awaited with its arguments and a sample, or with a list of samples."""
    problem, answers, probabilities = judged
    reward = adapter("slime")["reward"]
    samples = [SimpleNamespace(prompt=problem, response=answer, label="", metadata={}) for answer in answers]
    samples[1].prompt = [{"role": "user", "content": problem}]

    async def ask():
        single = await asyncio.gather(*(reward(SimpleNamespace(), sample) for sample in samples))
        return list(single), await reward(SimpleNamespace(), samples)

    assert asyncio.run(ask()) == (probabilities, probabilities)


def test_prime_rl_asks_for_a_reward(judged):
    """As verifiers' Rubric does: with what the function's signature names, or with all where it takes ``**``."""
    problem, answers, probabilities = judged
    function = adapter("prime-rl")["judge_reward"]

    async def rubric(answer):
        objects = {
            "prompt": [{"role": "user", "content": problem}],
            "completion": [{"role": "assistant", "content": answer}],
            "answer": "",
            "state": {},
            "info": {},
            "task": "default",
            "parser": object(),
        }
        parameters = inspect.signature(function).parameters
        if not any(item.kind == item.VAR_KEYWORD for item in parameters.values()):
            objects = {name: value for name, value in objects.items() if name in parameters}
        found = function(**objects)
        return float(await found if inspect.isawaitable(found) else found)

    async def ask():
        return [await rubric(answer) for answer in answers]

    assert asyncio.run(ask()) == probabilities


@pytest.mark.slow
def test_trl_asks_for_a_reward(judged, tmp_path):
    """TRL's own trainer, over texts and over messages."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    problem, answers, probabilities = judged
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        num_generations=2,
        per_device_train_batch_size=2,
    )
    trainer = GRPOTrainer(
        model=TINY,
        reward_funcs=adapter("TRL")["judge_reward"],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": problem, "level": "easy"}]),
    )
    inputs = [{"prompt": problem, "level": "easy"}] * 2
    found = trainer._calculate_rewards(inputs, [problem] * 2, answers, [[1], [1]])
    assert found[:, 0].tolist() == pytest.approx(probabilities)
    prompts = [[{"role": "system", "content": "s"}, {"role": "user", "content": problem}]] * 2
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    found = trainer._calculate_rewards([{"prompt": prompts[0]}] * 2, prompts, completions, [[1], [1]])
    assert found[:, 0].tolist() == pytest.approx(probabilities)


@pytest.mark.slow
def test_serve_judge_asks_for_its_token(tmp_path):
    command = [sys.executable, "-m", "ctrl_hpc.cli", "serve", "judge", "--model", TINY, "--prompts", "tiny"]
    command += ["--port", "0", "--threads", "1", "--token-env", "SECRET", "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"SECRET": "abc", "PATH": "/usr/bin:/bin"}
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip().removeprefix("listening on ")
    body = {"items": [item(0)]}
    assert httpx.post(f"{url}/score", json=body, timeout=60).status_code == 401
    answer = httpx.post(f"{url}/score", json=body, headers={"authorization": "Bearer abc"}, timeout=60)
    assert answer.json()["results"][0]["judgement"] == "correct"
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "calibrated": False}
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


def test_what_cannot_be_served_is_one_line(tmp_path, capsys):
    serve = ["serve", "judge", "--port", "0", "--model"]
    for arguments, told in (
        ([str(tmp_path)], "holds neither model.safetensors nor"),
        (["http://127.0.0.1:9/v1"], "names no model; expected URL#MODEL"),
        ([TINY, "--prompts", "nothing"], "'nothing' is no folder; allowed: ctrl, default, tiny"),
        ([TINY, "--calibration", str(tmp_path / "none.json")], "cannot be read"),
    ):
        assert cli.main([*serve, *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_other_weights_or_prompts_are_another_critic(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = server.identity(str(tmp_path), "default")
    assert first == server.identity(str(tmp_path), "default") != server.identity(str(tmp_path), "ctrl")
    (tmp_path / "model.safetensors").write_text("x")
    assert server.identity(str(tmp_path), "default") != first
    assert dataclasses.asdict(How()) == {"votes": 1, "temperature": 0.0, "max_tokens": 1024}
    assert Item(problem="p", answer="a").language is None
