"""The rollout client over servers that come, go, restart and lag behind."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_endpoint
import pytest
import random_qwen
import rollout_server
import torch
from jinja2 import Template
from transformers import AutoTokenizer

from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique
from ctrl_hpc.records import (
    CLOSE_ROOM,
    Chat,
    Critique,
    Generation,
    Message,
    Problem,
    Revision,
    Reward,
    Sampling,
    Solution,
    Verdict,
)
from ctrl_hpc.rollout.choices import Choices
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.decoding import Decoding
from ctrl_hpc.rollout.engine import load_engine
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.service import fleet
from ctrl_hpc.train.rollouts import Experience, Rollout

SAMPLING = Sampling(temperature=1.0, max_tokens=10, n=2, seed=11)


def chats(count: int) -> list[Chat]:
    return [(Message(role="user", content=f"print the sum {'x' * i}"),) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_qwen.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_qwen.build(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def urls(folder: str) -> Iterator[list[str]]:
    with rollout_server.running(folder) as first, rollout_server.running(folder) as second:
        yield [first, second]


def tokens(groups: Sequence[Sequence[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[item.token_ids for item in group] for group in groups]


def test_answers_do_not_depend_on_the_servers(urls: list[str], tokenizer: Any) -> None:
    many = RolloutClient(lambda: urls, tokenizer, max_in_flight=3)
    one = RolloutClient(lambda: urls[:1], tokenizer)
    spread, alone = many.complete(chats(7), SAMPLING), one.complete(chats(7), SAMPLING)
    assert tokens(spread) == tokens(alone)
    assert [len(group) for group in spread] == [2] * 7
    assert spread[0][0].token_ids != spread[0][1].token_ids
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "print the sum "}], add_generation_prompt=True
    )
    assert list(spread[0][0].prompt_ids) == list(template["input_ids"])
    assert spread[0][0].text == tokenizer.decode(list(spread[0][0].token_ids), skip_special_tokens=True)
    assert len(spread[0][0].logprobs) == len(spread[0][0].token_ids)
    assert one.complete([], SAMPLING) == []
    many.close()
    one.close()


def test_critiques_are_begun_and_closed(urls: list[str], folder: str, tokenizer: Any) -> None:
    """By ids: what was sampled stays, what is put there is marked, one of two words follows, drawn among them."""
    client = RolloutClient(lambda: urls, tokenizer)
    plain = Prompts.load("default")
    templates = {**plain.templates, "critique": Template("{{ problem.prompt }}")}
    prompts = replace(plain, templates=templates, critique_prefix="Analysis:", critique_close="Overall judgment:")
    opened = "<|im_start|>user\nsum<|im_end|>\n<|im_start|>assistant\nAnalysis:"
    problem = Problem(id="p", source="s", split="train", prompt="sum", tests=())
    draft = Solution(id="p/0", problem_id="p", text="print(1)", program="print(1)")
    sampling = Sampling(temperature=1.0, max_tokens=48, n=3, seed=5)
    engine: Any = load_engine(folder, device="cpu")
    right, wrong = (tuple(tokenizer(word)["input_ids"]) for word in (" Correct", " Incorrect"))
    assert right[0] == wrong[0] and right[1] != wrong[1]  # both begin with a blank, which is put there, too
    forced = (*tokenizer("\n\nOverall judgment:")["input_ids"], right[0])
    begin = replace(prompts, critique_close="")
    begun = critique([(problem, draft)], client, begin, replace(sampling, max_tokens=48 - CLOSE_ROOM))
    closed = critique([(problem, draft)], client, prompts, sampling)
    for first, item in zip(begun, closed, strict=True):
        made, own = item.generation, first.generation
        assert made is not None and own is not None and made.forced is not None
        start, end = made.forced
        assert made.prompt_ids == tuple(tokenizer(opened).input_ids)
        assert made.token_ids[:start] == tuple(t for t in own.token_ids if t not in tokenizer.all_special_ids)
        assert made.token_ids[start:end] == forced and made.logprobs[start:end] == (0.0,) * len(forced)
        assert made.token_ids[end:] == (right if item.judgement == "correct" else wrong)[1:]
        assert made.finish_reason == "stop" and len(made.token_ids) <= sampling.max_tokens
        assert first.text.startswith("Analysis:") and item.judgement is not None
        assert item.text == f"{first.text}\n\nOverall judgment: {item.judgement.capitalize()}"
        ids = torch.tensor([made.prompt_ids + made.token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(engine.model(ids).logits[0, len(made.prompt_ids) - 1 : -1], -1)
        found = logprobs.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0]
        assert torch.allclose(found[:start], torch.tensor(made.logprobs)[:start], atol=1e-4)
        either = torch.logsumexp(logprobs[end, [right[1], wrong[1]]], 0)
        assert made.logprobs[end] == pytest.approx(float(found[end] - either), abs=1e-4)
        assert made.logprobs[end + 1 :] == (0.0,) * (len(made.token_ids) - end - 1)
        sampled = [row for row in range(len(made.token_ids)) if not start <= row < end]
        rollout = Experience.of([_rollout(made)], version=0, position=0, metrics={})
        assert rollout.batch.n_tokens == len(sampled)
    again = critique([(problem, draft)], client, prompts, sampling)
    assert again == closed
    with pytest.raises(ValueError, match="takes 32 of a critique's 20 tokens"):
        critique([(problem, draft)], client, prompts, replace(sampling, max_tokens=20))
    client.close()


def test_words_are_drawn_as_the_model_finds_them_beside_each_other(folder: str, tokenizer: Any) -> None:
    """Of three words, one of which begins as another does, by the share of its deciding token."""
    with pytest.raises(ValueError, match="' a', ' ab', ' c': not told apart by the first token that differs"):
        Choices.of(tokenizer, "is", (" a", " ab", " c"))
    follow = Choices.of(tokenizer, "is", (" add", " Mul", " 3"))
    blank = tokenizer(" ")["input_ids"]
    assert follow.forced == (*tokenizer("is")["input_ids"], *blank)
    prompt = [5, 9, *follow.forced]
    engine: Any = load_engine(folder, device="cpu")
    asked = [Decoding(max_tokens=1, seed=seed, logit_bias=follow.biases) for seed in range(300)]
    drawn = [item.token_ids[0] for item in engine.generate([prompt] * 300, asked)]
    with torch.no_grad():
        shares = torch.softmax(engine.model(torch.tensor([prompt])).logits[0, -1, list(follow.words)].double(), 0)
    for token, share in zip(follow.words, shares.tolist(), strict=True):
        assert abs(drawn.count(token) - 300 * share) <= 4 * (300 * share * (1 - share)) ** 0.5
    decided = follow.whole(Generation(text="?", token_ids=(drawn[0],), logprobs=(-0.5,), finish_reason="length"))
    assert tokenizer.decode([*blank, *decided.token_ids]) == decided.text
    assert decided.logprobs == (-0.5,) + (0.0,) * (len(decided.token_ids) - 1) and decided.finish_reason == "stop"
    other = Generation(text="so", token_ids=(0,), logprobs=(-1.0,))
    assert follow.whole(other) == other  # of a server that knows no biases


def _rollout(generation: Generation) -> Rollout:
    verdict = Verdict(status="accepted")
    made = Critique(id="p/0#0", solution_id="p/0", text="", judgement=None, generation=generation)
    revision = Revision(critique_id="p/0#0", text="", program=None, kept=False, verdict=verdict)
    draft = Solution(id="p/0", problem_id="p", text="", program=None, verdict=verdict)
    return Rollout.of(made, revision, draft, Reward(critique_id="p/0#0", value=1.0, reason="passed"))


def test_an_openai_server_continues_a_message_too(urls: list[str], tokenizer: Any) -> None:
    """Greedy, the same text by OpenAI's route as by token ids."""
    ours, theirs = RolloutClient(lambda: urls, tokenizer), OpenAIGenerator(urls[0], "m")
    greedy = Sampling(temperature=0.0, max_tokens=8)
    begun = [(*chat, Message(role="assistant", content="read the numbers")) for chat in chats(2)]
    by_ids, by_text = ours.complete(begun, greedy), theirs.complete(begun, greedy)
    assert [group[0].text for group in by_ids] == [group[0].text for group in by_text]
    firsts = [Generation(text="correct", prompt_ids=group[0].prompt_ids) for group in by_ids]
    longer = [
        client.extend(begun, firsts, " print the sum", [replace(greedy, max_tokens=room)] * 2)
        for client, room in ((ours, 24), (theirs, 8))
    ]
    assert longer[1][0].text.startswith("correct print the sum") and longer[1][0].forced is None
    assert longer[1] == [
        replace(rest, text="correct print the sum" + rest.text)
        for group in theirs.complete(
            [(*chat, Message(role="assistant", content="read the numberscorrect print the sum")) for chat in chats(2)],
            greedy,
        )
        for rest in group
    ]
    ours.close()
    theirs.close()


def test_parts_of_a_call_side_by_side_are_drawn_as_in_the_whole(urls: list[str], tokenizer: Any) -> None:
    client = RolloutClient(lambda: urls, tokenizer, max_in_flight=3)
    whole = client.complete(chats(7), SAMPLING)
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(
            lambda first: client.complete(chats(7)[first : first + 2], replace(SAMPLING, first=first)), range(0, 7, 2)
        )
        assert tokens([group for part in parts for group in part]) == tokens(whole)
    client.close()


def test_a_server_that_is_not_there_loses_nothing(urls: list[str], tokenizer: Any) -> None:
    listening = rollout_server.listen("127.0.0.1", 0)
    dead = f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    client = RolloutClient(lambda: [dead, urls[0]], tokenizer, max_in_flight=2)
    reference = RolloutClient(lambda: urls, tokenizer)
    assert tokens(client.complete(chats(5), SAMPLING)) == tokens(reference.complete(chats(5), SAMPLING))
    client.close()
    reference.close()


def test_a_server_that_hangs_is_left_when_its_registration_goes(urls: list[str], tokenizer: Any) -> None:
    with rollout_server.listen("127.0.0.1", 0) as mute:  # accepts connections, never answers
        hung = f"http://127.0.0.1:{mute.getsockname()[1]}"
        asked = threading.Event()
        threading.Thread(target=lambda: (mute.accept(), asked.set()), daemon=True).start()
        client = RolloutClient(lambda: [urls[0]] if asked.is_set() else [hung], tokenizer)
        reference = RolloutClient(lambda: urls, tokenizer)
        assert tokens(client.complete(chats(3), SAMPLING)) == tokens(reference.complete(chats(3), SAMPLING))
        client.close()
        reference.close()


def test_a_server_that_hangs_holds_no_update_of_weights_up(urls: list[str], other: str, tokenizer: Any) -> None:
    with rollout_server.listen("127.0.0.1", 0) as mute:
        hung = f"http://127.0.0.1:{mute.getsockname()[1]}"
        asked = threading.Event()
        threading.Thread(target=lambda: (mute.accept(), asked.set()), daemon=True).start()
        client = RolloutClient(lambda: [urls[0]] if asked.is_set() else [hung, urls[0]], tokenizer)
        assert client.update_weights(other, 2) == 1
        assert {item.version for group in client.complete(chats(2), SAMPLING) for item in group} == {2}
        client.close()


def test_no_server_at_all_is_said(tokenizer: Any) -> None:
    client = RolloutClient(lambda: [], tokenizer, patience_s=0.2, role="critic")
    with pytest.raises(RuntimeError, match="no critic server has answered for 0 s"):
        client.complete(chats(1), SAMPLING)
    client.close()


def aborting(times: int) -> tuple[list[Any], json_endpoint.Answer]:
    """A server that aborts its first answers, the last completion of each, and the bodies that it got."""
    asked: list[Any] = []

    def answer(body: Any, _: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        asked.append(body)
        count = len(body["input_ids"])
        finish = [{"type": "stop", "matched": 5}] * (count - 1)
        finish.append({"type": "abort", "message": "paused"} if len(asked) <= times else finish[0])
        metas = [{"finish_reason": item, "output_token_logprobs": [(-0.5, 5, None)]} for item in finish]
        return 200, {}, [{"text": "a", "output_ids": [5], "meta_info": meta} for meta in metas]

    return asked, answer


def test_what_a_server_aborts_is_asked_again(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More often than a fault would be; and no request leaves sampling values to a server's defaults."""
    monkeypatch.setattr(fleet, "COOL_DOWN_S", (0.0, 0.0))
    monkeypatch.setattr(fleet, "POLL_S", 0.001)
    asked, answer = aborting(7)
    with json_endpoint.serving(answer) as url:
        client = RolloutClient(lambda: [url], tokenizer)
        (group,) = client.complete(chats(1), SAMPLING)
        client.close()
    assert [item.finish_reason for item in group] == ["stop", "stop"] and len(asked) == 8
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(params | neutral == params for params in asked[0]["sampling_params"])


def test_a_server_that_aborts_everything_is_left_after_a_while(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "COOL_DOWN_S", (0.0, 0.0))
    monkeypatch.setattr(fleet, "POLL_S", 0.001)
    asked, answer = aborting(10**9)
    with json_endpoint.serving(answer) as url:
        client = RolloutClient(lambda: [url], tokenizer, patience_s=0.05)
        with pytest.raises(RuntimeError, match=r"for 0 s servers have aborted whatever they did: http.* aborted"):
            client.complete(chats(1), SAMPLING)
        client.close()
    assert len(asked) >= 5


def test_a_refused_request_is_the_users_error(urls: list[str], tokenizer: Any) -> None:
    client = RolloutClient(lambda: urls, tokenizer)
    with pytest.raises(ValueError, match="256 positions"):
        client.complete([(Message(role="user", content="7 " * 400),)], SAMPLING)
    client.close()


def test_new_weights_reach_every_server_and_late_ones(folder: str, other: str, tokenizer: Any) -> None:
    live: list[str] = []
    client = RolloutClient(lambda: list(live), tokenizer, max_in_flight=2)
    with rollout_server.running(folder) as first, rollout_server.running(folder) as late:
        live.append(first)
        before = client.complete(chats(4), SAMPLING)
        assert client.update_weights(other, 3) == 1
        live.append(late)
        after = client.complete(chats(4), SAMPLING)
    assert {item.version for group in before for item in group} == {0}
    assert {item.version for group in after for item in group} == {3}
    assert tokens(before) != tokens(after)
    client.close()


def test_a_restarted_server_gets_the_newest_weights_again(folder: str, other: str, tokenizer: Any) -> None:
    engine = load_engine(folder, device="cpu")
    with rollout_server.running(folder, engine) as url:
        client = RolloutClient(lambda: [url], tokenizer)
        client.update_weights(other, 5)
        expected = client.complete(chats(2), SAMPLING)
        engine.load_weights(folder, 0)  # what a restart at the same address looks like
        assert tokens(client.complete(chats(2), SAMPLING)) == tokens(expected)
        assert engine.version == 5
        client.close()


def test_a_server_with_newer_weights_loads_those_that_are_asked_for(folder: str, other: str, tokenizer: Any) -> None:
    engine = load_engine(folder, device="cpu")
    with rollout_server.running(folder, engine) as url:
        client = RolloutClient(lambda: [url], tokenizer)
        client.update_weights(folder, 4)
        expected = client.complete(chats(2), SAMPLING)
        engine.load_weights(other, 9)  # by a trainer that was taken for lost, and got further
        again = client.complete(chats(2), SAMPLING)
        assert tokens(again) == tokens(expected)
        assert {item.version for group in again for item in group} == {4}
        client.close()


def test_refused_weights_are_an_error(urls: list[str], tokenizer: Any, tmp_path: Path) -> None:
    client = RolloutClient(lambda: urls, tokenizer)
    with pytest.raises(ValueError, match="no model folder"):
        client.update_weights(str(tmp_path / "none"), 1)
    client.close()
