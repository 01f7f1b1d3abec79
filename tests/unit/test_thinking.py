"""Thinking models: real templates, awkward answers right by hand, and thoughts kept out of all that follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_endpoint
import pytest
import random_qwen
import rollout_server
import test_rollout_chat
from transformers import AutoTokenizer

from ctrl_hpc import preflight
from ctrl_hpc.cluster.connect import connect
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.config import ROOT, Config, CriticConfig, RLConfig, dump, load
from ctrl_hpc.flow.filters import select
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.reward import score
from ctrl_hpc.flow.steps import critique, draft, revise
from ctrl_hpc.flow.text import extract_program, parse_judgement
from ctrl_hpc.records import Critique, Generation, Message, Problem, Revision, Reward, Sampling, Solution, Verdict
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.rollout.thinking import CLOSED_BY_FORCE, Thinking, can_think, opens_thought, split, too_long
from ctrl_hpc.train.rewards import Rewards
from ctrl_hpc.train.rollouts import Experience, Rollout, summary

CHAT = (Message(role="user", content="judge it <think>"),)
THOUGHTS = ("<think>", "</think>")
FAMILIES = {
    "qwen3": (test_rollout_chat.CHATML, THOUGHTS),
    "qwen3_5_think": (test_rollout_chat.CHATML, THOUGHTS),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        THOUGHTS,
    ),
    "qwen2_5": (test_rollout_chat.CHATML, ()),
}
"""The published templates, as TRL has them, with their control tokens."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: test_rollout_chat.tokenizer_of(name, tokens) for name, tokens in FAMILIES.items()}


EMPTY = "<think>\n\n</think>\n\n"
ENDS = {
    "qwen3": {"auto": "assistant\n", "on": "assistant\n", "off": f"assistant\n{EMPTY}"},
    "qwen3_5_think": {"auto": "assistant\n<think>\n", "on": "assistant\n<think>\n", "off": f"assistant\n{EMPTY}"},
    "deepseek_r1_distill": {"auto": "<｜Assistant｜><think>\n", "on": "<｜Assistant｜><think>\n", "off": None},
    "qwen2_5": {"auto": "assistant\n", "on": None, "off": "assistant\n"},
}
"""How a prompt ends by mode; None: this model cannot do that."""


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_templates_own_switch_is_set(tokenizers: dict[str, Any], family: str, mode: Any) -> None:
    thinking, tokenizer, end = Thinking(mode=mode), tokenizers[family], ENDS[family][mode]
    if end is None:
        with pytest.raises(
            ValueError, match=rf"critic\.thinking: {mode} is not possible: this model (always thinks|does)"
        ):
            thinking.check(tokenizer, "critic.thinking")
        return
    thinking.check(tokenizer, "critic.thinking")
    ids = chat_ids(tokenizer, CHAT, **thinking.switch)
    assert tokenizer.decode(ids).endswith(end)
    assert opens_thought(tokenizer, ids) == end.endswith("<think>\n")


JUDGED = "Analysis: fine.\nOverall judgment: {}"
RIGHT, WRONG = JUDGED.format("Correct"), JUDGED.format("Incorrect")
CUT = object()
"""In place of an answer: the thought has no end."""
PLAIN = object()
"""In place of an answer: the text is one as it stands, without a thought."""
type Read = tuple[str | None, Any]
ANSWERS: list[tuple[str, Read, Read, Read]] = [
    # A completion; what it is after Qwen3's prompt, after one that has opened the thought, and of a model without any.
    (f"<think>\nhm\n</think>\n\n{RIGHT}", ("hm", RIGHT), ("hm", RIGHT), ("hm", RIGHT)),
    (f"hm\n</think>\n\n{WRONG}", ("hm", WRONG), ("hm", WRONG), (None, PLAIN)),
    (f"<think>\n{WRONG}\n</think>\n\n{RIGHT}", (WRONG, RIGHT), (WRONG, RIGHT), (WRONG, RIGHT)),
    (f"{WRONG}\n</think>\n\n{RIGHT}", (WRONG, RIGHT), (WRONG, RIGHT), (None, PLAIN)),
    (f"<think>\n{RIGHT}", (RIGHT, CUT), (RIGHT, CUT), (RIGHT, CUT)),
    (RIGHT, (None, PLAIN), (RIGHT, CUT), (None, PLAIN)),
    ("", (None, PLAIN), ("", CUT), (None, PLAIN)),
    ("<think>", ("", CUT), ("", CUT), ("", CUT)),
    ("</think>", ("", ""), ("", ""), (None, PLAIN)),
    (f"<think></think>{WRONG}", ("", WRONG), ("", WRONG), ("", WRONG)),
    (f"<think>\n\n</think>\n\n{WRONG}", ("", WRONG), ("", WRONG), ("", WRONG)),
    (f"\n <think>hm</think>\n{WRONG}", ("hm", WRONG), ("hm", WRONG), ("hm", WRONG)),
    (
        f"<think>a</think>\n<think>{RIGHT}</think>\n{WRONG}",
        (f"a\n{RIGHT}", WRONG),
        (f"a\n{RIGHT}", WRONG),
        (f"a\n{RIGHT}", WRONG),
    ),
    (f"<think>a</think><think>{RIGHT}", (f"a\n{RIGHT}", CUT), (f"a\n{RIGHT}", CUT), (f"a\n{RIGHT}", CUT)),
    (
        f"<think>a <think> b</think>{RIGHT}",  # it names the tag within
        ("a <think> b", RIGHT),
        ("a <think> b", RIGHT),
        ("a <think> b", RIGHT),
    ),
    (f"It prints '<think>'.\n{WRONG}", (None, PLAIN), (f"It prints '<think>'.\n{WRONG}", CUT), (None, PLAIN)),
    (
        f"It prints '<think>x</think>'.\n{WRONG}",
        (None, PLAIN),
        ("It prints '<think>x", f"'.\n{WRONG}"),
        (None, PLAIN),
    ),
    (
        f"<think>a</think>\nPrint '</think>'.\n{WRONG}",  # after its thought an answer may say what it likes
        ("a", f"Print '</think>'.\n{WRONG}"),
        ("a", f"Print '</think>'.\n{WRONG}"),
        ("a", f"Print '</think>'.\n{WRONG}"),
    ),
    (f"<Think>a</Think>{RIGHT}", (None, PLAIN), (f"<Think>a</Think>{RIGHT}", CUT), (None, PLAIN)),
    (f"<think>a</thin{RIGHT}", (f"a</thin{RIGHT}", CUT), (f"a</thin{RIGHT}", CUT), (f"a</thin{RIGHT}", CUT)),
]
COLUMN = {"qwen3": 1, "qwen3_5_think": 2, "deepseek_r1_distill": 2, "qwen2_5": 3}


@pytest.mark.parametrize("row", range(len(ANSWERS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_awkward_answers(tokenizers: dict[str, Any], family: str, row: int) -> None:
    tokenizer, text = tokenizers[family], ANSWERS[row][0]
    thought, answer = ANSWERS[row][COLUMN[family]]  # type: ignore[misc]
    opened = opens_thought(tokenizer, chat_ids(tokenizer, CHAT))
    found = split(text, opened=opened, thinks=can_think(tokenizer))
    assert found == (thought, "" if answer is CUT else text if answer is PLAIN else answer, answer is CUT)
    if answer is CUT:
        assert parse_judgement(found[1]) is None and extract_program(found[1]) is None
    elif answer in (RIGHT, WRONG):
        assert parse_judgement(found[1]) == ("correct" if answer == RIGHT else "incorrect")


def test_there_are_twenty_of_each() -> None:
    assert len(ANSWERS) == 20 and len({text for text, *_ in ANSWERS}) == 20


TEMPLATE = random_qwen.CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}",
)
"""With Qwen3.5's switch."""


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A server of a random model whose template opens a thought, and its tokenizer."""
    folder = random_qwen.build(tmp_path_factory.mktemp("thinker"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with rollout_server.running(folder) as url:
        yield url, tokenizer


def test_a_thought_too_long_is_ended_by_force_and_answered(thinker: tuple[str, Any]) -> None:
    url, tokenizer = thinker
    sampling = Sampling(temperature=1.0, max_tokens=6, n=3, seed=4)
    closing = tuple(tokenizer(CLOSED_BY_FORCE, add_special_tokens=False)["input_ids"])
    plain = RolloutClient(lambda: [url], tokenizer, thinking=Thinking(tokens=8), role="critic")
    closed = RolloutClient(lambda: [url], tokenizer, thinking=Thinking(tokens=8, close=True), role="critic")
    (left,), (made,) = plain.complete([CHAT], sampling), closed.complete([CHAT], sampling)
    assert closed.complete([CHAT], sampling) == [made]
    for open_ended, item in zip(left, made, strict=True):
        assert open_ended.thought_cut and open_ended.text == "" and len(open_ended.token_ids) <= 14
        n = min(8, len(open_ended.token_ids) - (open_ended.finish_reason == "stop"))
        assert item.token_ids[:n] == open_ended.token_ids[:n] and item.logprobs[:n] == open_ended.logprobs[:n]
        assert item.forced == (n, n + len(closing)) and item.token_ids[n : n + len(closing)] == closing
        assert set(item.logprobs[n : n + len(closing)]) == {0.0}
        answer = item.token_ids[n + len(closing) :]
        assert 1 <= len(answer) <= 6 and len(item.logprobs) == len(item.token_ids)
        assert item.text.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert not item.thought_cut and n < item.thought_tokens <= n + len(closing)
        assert item.thought == tokenizer.decode(item.token_ids[:n], skip_special_tokens=True).strip()
    rollouts = [_rollout(item) for item in made]
    experience = Experience.of(rollouts, version=0, position=0, metrics={})
    assert experience.batch.n_tokens == sum(len(item.token_ids) - len(closing) for item in made)
    assert bool(experience.batch.mask_SR[:, 0].all()), "the thought is learnt"
    metrics = summary(rollouts, 0)
    assert metrics["rl/thought_closed"] == 1 and metrics["rl/thought_cut"] == 0
    assert metrics["rl/thought_tokens"] + metrics["rl/answer_tokens"] == pytest.approx(metrics["rl/critique_tokens"])
    assert summary([_rollout(item) for item in left], 0)["rl/thought_cut"] == 1
    plain.close()
    closed.close()


def test_a_generators_thought_too_long_is_no_lost_revision(thinker: tuple[str, Any], tmp_path: Path) -> None:
    """As the run connects: without the key a cut-off thought leaves no text, with it an answer of its own budget."""
    url, tokenizer = thinker
    tokenizer.save_pretrained(tmp_path)
    found = []
    for close in (False, True):
        keys = ["generator_thought_tokens=8", f"generator_close_thought={close}"]
        config = load(ROOT / "configs" / "tiny.yaml", [f"generator={tmp_path}", *keys])
        with Registry(tmp_path / "run").register("generator", url, id="0"):
            connections = connect(config, tmp_path / "run")
            ((item,),) = connections.generator.complete([CHAT], Sampling(temperature=1.0, max_tokens=6, seed=4))
            connections.close()
        found.append(item)
    assert found[0].thought_cut and not found[0].text
    assert not found[1].thought_cut and found[1].text and found[1].thought in found[0].thought
    assert 1 <= len(found[1].token_ids) - found[1].forced[1] <= 6


def test_what_a_template_cannot_do_is_told_before_anything_starts(tmp_path: Path) -> None:
    random_qwen.build(tmp_path / "plain")
    places = [f"critic.model={tmp_path / 'plain'}", f"generator={tmp_path / 'plain'}", f"run_dir={tmp_path / 'run'}"]
    for key in ("critic.thinking", "generator_thinking"):
        config = load(ROOT / "configs" / "tiny.yaml", [*places, f"{key}=on"])
        told = [finding.text for finding in preflight.findings(config)]
        assert told == [f"{key}: on is not possible: this model does not think, by its chat template; auto"]
        assert not list(preflight.findings(load(ROOT / "configs" / "tiny.yaml", [*places, f"{key}=off"])))


def test_a_thought_is_too_long_by_its_own_tokens(thinker: tuple[str, Any]) -> None:
    """What ends a thought does not count, nor what is answered; one without an end is too long in any case."""
    tokenizer = thinker[1]

    def said(text: str) -> Generation:
        return Generation(text=text, token_ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    n = len(tokenizer("hm hm", add_special_tokens=False)["input_ids"])
    whole = said(f"hm hm</think>\n\n{RIGHT}")
    assert [too_long(whole, budget, opened=True, tokenizer=tokenizer) for budget in (n - 1, n)] == [True, False]
    assert too_long(said("hm hm"), 100, opened=True, tokenizer=tokenizer)
    assert not too_long(said(RIGHT), 0, opened=False, tokenizer=tokenizer)


def test_a_model_that_is_told_not_to_think_answers_at_once(thinker: tuple[str, Any]) -> None:
    url, tokenizer = thinker
    client = RolloutClient(lambda: [url], tokenizer, thinking=Thinking(mode="off", tokens=8), role="critic")
    (made,) = client.complete([CHAT], Sampling(temperature=1.0, max_tokens=6, n=2, seed=4))
    for item in made:
        assert item.thought is None and item.text and len(item.token_ids) <= 6
        assert tokenizer.decode(list(item.prompt_ids)).endswith(EMPTY)
    client.close()


def _rollout(generation: Generation) -> Rollout:
    verdict = Verdict(status="accepted")
    made = Critique(id="p/0#0", solution_id="p/0", text=generation.text, judgement=None, generation=generation)
    revision = Revision(critique_id="p/0#0", text="", program=None, kept=False, verdict=verdict)
    solution = Solution(id="p/0", problem_id="p", text="", program=None, verdict=verdict)
    return Rollout.of(made, revision, solution, Reward(critique_id="p/0#0", value=1.0, reason="passed"))


class Thinker:
    """A generator of given completions, read as a client reads them."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def complete(self, chats: Any, sampling: Sampling) -> list[list[Generation]]:
        out = []
        for chat in chats:
            self.asked.append(chat)
            thought, answer, cut = split(self.texts.pop(0), opened=False, thinks=True)
            out.append([Generation(text=answer, thought=thought, thought_cut=cut)])
        return out


def test_a_thought_reaches_neither_judgement_leak_check_revision_nor_extraction() -> None:
    program = "\n".join(f"x{i} = {i} + {i}" for i in range(6))
    thought = f"<think>The tests failed.\n```python\n{program}\n```\n{RIGHT}</think>\n\n"
    problem = Problem(id="p", source="ours", split="train", prompt="add", tests=())
    prompts, sampling = Prompts.load("default"), Sampling()
    (solution,) = draft([problem], Thinker(f"{thought}```python\nprint(1)\n```"), prompts, sampling)
    assert solution.program == "print(1)" and "x1" not in solution.text
    solution = replace(solution, verdict=Verdict(status="wrong_answer"))
    (made,) = critique([(problem, solution)], Thinker(thought + WRONG), prompts, sampling)
    assert made.text == WRONG and made.judgement == "incorrect"
    reviser = Thinker(f"{thought}```python\n{program}\n```")
    (revision,) = revise([(problem, solution, made)], reviser, prompts, replace(sampling, temperature=0.0))
    assert revision.program == program
    assert "x1" not in "".join(message.content for message in reviser.asked[0])
    revision = replace(revision, verdict=Verdict(status="accepted"))
    assert not score(made, revision, solution.verdict, leak_penalty=1.0, draft_program="print(1)").leaked  # type: ignore[arg-type]
    (cut,) = critique([(problem, solution)], Thinker(f"<think>{WRONG}"), prompts, sampling)
    assert cut.judgement is None and cut.text == ""
    assert score(cut, revision, solution.verdict).reason == "no_judgement"  # type: ignore[arg-type]
    hinting = replace(made, generation=Generation(text=WRONG, thought="The hint says that it fails."))
    kept, rejected = select([(hinting, solution)], n=1, balance=False, consistent_only=True, seed=0)
    assert not kept and rejected[0].reason == "mentions_hint"  # a thought is learnt, so it must not tell of the hint


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": WRONG, "reasoning_content": RIGHT}, "stop", (RIGHT, WRONG, False)),
        ({"content": None, "reasoning_content": RIGHT}, "length", (RIGHT, "", True)),
        ({"content": f"hm</think>\n\n{WRONG}"}, "stop", ("hm", WRONG, False)),
        ({"content": f"hm {RIGHT}"}, "length", (f"hm {RIGHT}", "", True)),
        ({"content": RIGHT}, "stop", (None, RIGHT, False)),
    ],
)
def test_an_endpoint_is_asked_by_its_templates_switch(message: Any, finish: str, expected: Any) -> None:
    sent: list[Any] = []

    def answer(body: Any, headers: Any) -> Any:
        sent.append(body)
        return 200, {}, {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}

    with json_endpoint.serving(answer) as url:
        client = OpenAIGenerator(url, "m", thinking=Thinking(mode="on", tokens=100))
        ((found,),) = client.complete([CHAT], Sampling(max_tokens=20))
        client.close()
    assert (found.thought, found.text, found.thought_cut) == expected
    assert sent[0]["chat_template_kwargs"] == {"enable_thinking": True} and sent[0]["max_tokens"] == 120


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["critic.close_thought=true"], r"critic\.close_thought: needs a budget, critic\.thought_tokens"),
        (
            ["critic.close_thought=true", "critic.thought_tokens=9", "prompts.critique_close=x"],
            r"critic\.close_thought: does not go with prompts\.critique_close",
        ),
        (["generator_close_thought=true"], r"generator_close_thought: needs a budget, generator_thought_tokens"),
        (
            ["generator_close_thought=true", "generator_thought_tokens=9", "generator_thinking=off"],
            r"generator_close_thought: needs a budget, generator_thought_tokens, and a generator that thinks",
        ),
        (
            ["generator_close_thought=true", "generator_thought_tokens=9", "generator=oracle"],
            r"generator_close_thought: goes with a generator that the run serves, a folder; not with oracle",
        ),
        (["critic.thinking=on", "prompts.critique_prefix=x"], r"critic\.thinking: on leaves no place for"),
        (["rl.overlong_buffer=5000"], r"rl\.overlong_buffer: 5000 is more than a critique's"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(ROOT / "configs" / "tiny.yaml", changes)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_on_and_off_are_words(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\ncritic: {{thinking: {mode}}}\n")
    assert load(file).critic.thinking == mode
    again = load(file, [f"generator_thinking={mode}"])
    file.write_text(dump(again))
    assert (load(file).critic.thinking, load(file).generator_thinking) == (mode, mode)


def test_overlong_critiques_pay_as_those_of_dapo_do() -> None:
    """100 tokens at most, a buffer of 20, a penalty of 0.5: 80 tokens pay nothing, 90 half of it, 100 all."""
    options = RLConfig(max_tokens=60, overlong_buffer=20, overlong_penalty=0.5)
    problem = Problem(id="p", source="ours", split="train", prompt="", tests=())
    solution = Solution(id="p/0", problem_id="p", text="", program="1", verdict=Verdict(status="wrong_answer"))
    samples = []
    for count in (10, 80, 90, 100):
        generation = Generation(text=WRONG, token_ids=(1,) * count)
        made = Critique(id="c", solution_id="p/0", text=WRONG, judgement="incorrect", generation=generation)
        revision = Revision(critique_id="c", text="", program="2", kept=False, verdict=Verdict(status="accepted"))
        samples.append((problem, solution, made, revision))
    longest = options.max_tokens + Config(name="x", critic=CriticConfig(thought_tokens=40)).critic.thought_tokens
    found = Rewards.at(options, 0, longest=longest).score(samples)
    assert [reward.value for reward in found] == pytest.approx([1.0, 1.0, 0.75, 0.5])
