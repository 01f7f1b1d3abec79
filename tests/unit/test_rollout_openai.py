"""The OpenAI-compatible generator against a scripted endpoint: retries, limits, cost, user errors."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import json_endpoint
import pytest

from ctrl_hpc.records import Message, Sampling
from ctrl_hpc.rollout import openai_client
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.service.http import listen

CHATS = [(Message(role="user", content=f"question {i}"),) for i in range(3)]
Answer = tuple[int, dict[str, str], Any]


class Endpoint:
    """Answers ``/v1/chat/completions`` by ``script(number, body)``; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: good(body)
        self.lock = threading.Lock()


def good(body: dict[str, Any]) -> Answer:
    text = body["messages"][-1]["content"].upper()
    choices = [
        {"index": j, "message": {"role": "assistant", "content": f"{text} {j}"}, "finish_reason": "stop"}
        for j in range(body["n"])
    ]
    return 200, {}, {"choices": choices[::-1], "usage": {"prompt_tokens": 10, "completion_tokens": 4}}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Endpoint, str]]:
    state = Endpoint()

    def answer(body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with state.lock:
            number = len(state.asked)
            state.asked.append(body)
            state.keys.append(headers.get("authorization"))
        return state.script(number, body)

    async def no_sleep(_: float) -> None:
        return

    monkeypatch.setattr(openai_client.asyncio, "sleep", no_sleep)
    with json_endpoint.serving(answer) as url:
        yield state, url


def test_answers_come_in_order_with_their_cost(endpoint: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch) -> None:
    state, url = endpoint
    monkeypatch.setenv("MY_KEY", "secret")
    generator = OpenAIGenerator(url, "m", key_env="MY_KEY", price_in=2.0, price_out=10.0)
    out = generator.complete(CHATS, Sampling(temperature=0.5, max_tokens=7, n=2, seed=1))
    assert [[item.text for item in group] for group in out] == [
        [f"QUESTION {i} {j}" for j in range(2)] for i in range(3)
    ]
    assert (generator.usage.prompt_tokens, generator.usage.completion_tokens) == (30, 12)
    assert generator.usage.cost == pytest.approx(30 * 2e-6 + 12 * 10e-6)
    body = next(item for item in state.asked if item["messages"][0]["content"] == "question 0")
    assert (body["model"], body["max_tokens"], body["temperature"], body["n"]) == ("m", 7, 0.5, 2)
    assert len({item["seed"] for item in state.asked}) == 3
    assert set(state.keys) == {"Bearer secret"}
    generator.close()


def test_rate_limits_and_faults_are_retried(endpoint: tuple[Endpoint, str]) -> None:
    state, url = endpoint
    state.script = lambda number, body: [(429, {"retry-after": "3"}, {}), (503, {}, {}), good(body)][min(number, 2)]
    generator = OpenAIGenerator(f"{url}/v1", "m", key_env="NOT_SET_ANYWHERE")
    assert generator.complete(CHATS[:1], Sampling())[0][0].text == "QUESTION 0 0"
    assert (len(state.asked), generator.usage.retries) == (3, 2)
    assert state.keys == [None] * 3
    generator.close()


def test_an_endpoint_that_keeps_failing_is_an_error(endpoint: tuple[Endpoint, str]) -> None:
    state, url = endpoint
    state.script = lambda number, body: (500, {}, {"error": "out of order"})
    generator = OpenAIGenerator(url, "m", max_tries=3)
    with pytest.raises(RuntimeError, match=r"failed 3 times; the last answer: HTTP 500: .*out of order"):
        generator.complete(CHATS[:1], Sampling())
    assert len(state.asked) == 3
    generator.close()


NO_ANSWERS = [
    {"error": {"message": "overloaded", "code": 502}},
    {"choices": None},
    {"choices": []},
    {"choices": [{"index": 0, "message": None}]},
    {"choices": [{"index": 0, "message": {"content": 5}}]},
    {"choices": [{"index": 0, "message": {"content": "half of"}, "finish_reason": "abort"}]},
    [],
    None,
    "<html>Bad gateway</html>",
]


@pytest.mark.parametrize("wrong", NO_ANSWERS, ids=str)
def test_an_answer_without_a_completion_is_a_fault(endpoint: tuple[Endpoint, str], wrong: Any) -> None:
    state, url = endpoint
    state.script = lambda number, body: (200, {}, wrong) if number == 0 else good(body)
    generator = OpenAIGenerator(url, "m")
    assert generator.complete(CHATS[:1], Sampling())[0][0].text == "QUESTION 0 0"
    assert (len(state.asked), generator.usage.retries, generator.usage.requests) == (2, 1, 1)
    state.script = lambda number, body: (200, {}, wrong)
    stubborn = OpenAIGenerator(url, "m", max_tries=2)
    with pytest.raises(RuntimeError, match=r"failed 2 times; the last answer: HTTP 200: .* \(no completion\)") as told:
        stubborn.complete(CHATS[:1], Sampling())
    assert "\n" not in str(told.value)
    generator.close()
    stubborn.close()


def test_a_limit_under_another_name(endpoint: tuple[Endpoint, str]) -> None:
    """As o-series and GPT-5 have it; told once, it is known."""
    state, url = endpoint
    refusal = {"error": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    state.script = lambda number, body: (400, {}, refusal) if "max_tokens" in body else good(body)
    generator = OpenAIGenerator(url, "m", max_tries=1)
    for _ in range(2):
        out = generator.complete(CHATS, Sampling(max_tokens=7))
        assert [group[0].text for group in out] == [f"QUESTION {i} 0" for i in range(3)]
    assert all(body["max_completion_tokens"] == 7 for body in state.asked[-3:])
    assert generator.usage.retries == 0
    generator.close()


@pytest.mark.parametrize("refused", [True, False])
def test_several_completions_of_an_endpoint_that_gives_one(endpoint: tuple[Endpoint, str], refused: bool) -> None:
    state, url = endpoint

    def script(number: int, body: dict[str, Any]) -> Answer:
        if refused and body["n"] > 1:
            return 400, {}, {"error": "'n' must be 1"}
        return good({**body, "n": 1, "messages": [{"content": f"seed {body['seed']}"}]})

    state.script = script
    generator = OpenAIGenerator(url, "m")
    ((*completions,),) = generator.complete(CHATS[:1], Sampling(n=3, seed=1))
    assert len({completion.text for completion in completions}) == 3  # each by a seed of its own
    assert len(state.asked) == (4 if refused else 3)
    generator.close()


def test_content_in_parts(endpoint: tuple[Endpoint, str]) -> None:
    state, url = endpoint
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    state.script = lambda number, body: (200, {}, {"choices": [{"message": {"content": parts}}]})
    generator = OpenAIGenerator(url, "m")
    assert generator.complete(CHATS[:1], Sampling())[0][0].text == "ab"
    generator.close()


@pytest.mark.parametrize(("code", "message"), [(401, r"HTTP 401: .*key is read from \$MY_KEY"), (400, "HTTP 400")])
def test_refusals_are_not_retried(endpoint: tuple[Endpoint, str], code: int, message: str) -> None:
    state, url = endpoint
    state.script = lambda number, body: (code, {}, {"error": "no"})
    generator = OpenAIGenerator(url, "m", key_env="MY_KEY")
    with pytest.raises(ValueError, match=message):
        generator.complete(CHATS[:1], Sampling())
    assert len(state.asked) == 1
    generator.close()


def test_the_rate_limit_spaces_requests(endpoint: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(openai_client.asyncio, "sleep", note)
    monkeypatch.setattr(openai_client.time, "monotonic", lambda: 100.0)
    _, url = endpoint
    generator = OpenAIGenerator(url, "m", requests_per_min=30)
    generator.complete(CHATS, Sampling())
    assert sorted(waits) == pytest.approx([0.0, 2.0, 4.0])
    generator.close()


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"message": "overloaded"}},
        {"choices": None},
        {"choices": []},
        {"choices": [{"index": 0, "message": None}]},
        [],
        None,
        "<html>\n<h1>bad gateway</h1></html>",
    ],
)
def test_answers_that_are_no_completion_are_retried_then_one_line(endpoint: tuple[Endpoint, str], answer: Any) -> None:
    state, url = endpoint
    state.script = lambda number, body: (200, {}, answer) if number < 2 else good(body)
    generator = OpenAIGenerator(url, "m", max_tries=3)
    assert generator.complete(CHATS[:1], Sampling())[0][0].text == "QUESTION 0 0"
    assert generator.usage.requests == 1
    state.script = lambda number, body: (200, {}, answer)
    with pytest.raises(RuntimeError, match=r"failed 3 times; the last answer: HTTP 200: .* \(no completion\)") as error:
        generator.complete(CHATS[:1], Sampling())
    assert "\n" not in str(error.value)
    generator.close()


def test_models_that_want_another_name_for_the_length_get_it(endpoint: tuple[Endpoint, str]) -> None:
    state, url = endpoint
    told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    state.script = lambda number, body: (400, {}, {"error": told}) if "max_tokens" in body else good(body)
    generator = OpenAIGenerator(url, "m")
    assert generator.complete(CHATS[:1], Sampling(max_tokens=9))[0][0].text == "QUESTION 0 0"
    assert generator.complete(CHATS[:1], Sampling(max_tokens=9))[0][0].text == "QUESTION 0 0"
    assert [item.get("max_tokens") for item in state.asked] == [9, None, None]
    assert [item.get("max_completion_tokens") for item in state.asked] == [None, 9, 9]
    generator.close()


def test_an_endpoint_that_nobody_listens_at_is_said_at_once() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    generator = OpenAIGenerator(f"http://127.0.0.1:{port}", "m")
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}/v1/chat/completions cannot be reached: ConnectError"):
        generator.complete(CHATS[:1], Sampling())
    generator.close()
