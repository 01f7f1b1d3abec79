"""The HTTP routes of the rollout server, asked with plain httpx."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import random_qwen
import rollout_server
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from ctrl_hpc.records import Generation
from ctrl_hpc.rollout import openai_logprobs
from ctrl_hpc.rollout.decoding import Completion, Decoding
from ctrl_hpc.rollout.engine import load_engine
from ctrl_hpc.rollout.server import create_app, serve
from ctrl_hpc.rollout.worker import RolloutService, Worker
from ctrl_hpc.service.http import listen

PROMPT = [5, 9, 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_qwen.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def http(folder: str) -> Iterator[httpx.Client]:
    with rollout_server.running(folder) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def generate(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_generate_gives_ids_and_logprobs(http: httpx.Client, folder: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 5}
    answer = generate(http, input_ids=PROMPT, sampling_params=params, return_logprob=True)
    engine: Any = load_engine(folder, device="cpu")
    ids = torch.tensor([PROMPT])
    expected = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert answer["output_ids"] == expected[0, 3:].tolist()
    triples = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in triples] == answer["output_ids"]
    assert all(logprob <= 0 for logprob, _, _ in triples)
    assert answer["meta_info"]["prompt_tokens"] == 3
    assert answer["meta_info"]["weight_version"] == "0"
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 5}


def test_lists_are_batches_with_parameters_of_their_own(http: httpx.Client) -> None:
    params = [{"max_new_tokens": 3, "sampling_seed": 1}, {"max_new_tokens": 6, "sampling_seed": 1}]
    short, long = generate(http, input_ids=[PROMPT, PROMPT], sampling_params=params)
    assert long["output_ids"][:3] == short["output_ids"]
    assert len(long["output_ids"]) > 3


def test_n_gives_different_seeded_samples(http: httpx.Client) -> None:
    params = {"max_new_tokens": 12, "n": 3, "sampling_seed": 7}
    first = generate(http, input_ids=PROMPT, sampling_params=params)
    again = generate(http, input_ids=PROMPT, sampling_params=params)
    assert [item["output_ids"] for item in first] == [item["output_ids"] for item in again]
    assert len({tuple(item["output_ids"]) for item in first}) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "exactly one of text and input_ids"),
        ({"input_ids": []}, "is empty"),
        ({"input_ids": PROMPT, "sampling_params": {"temprature": 1}}, "sampling_params.temprature is unknown"),
        ({"input_ids": PROMPT, "image_data": "x"}, "image_data"),
        ({"input_ids": PROMPT, "sampling_params": {"regex": "a+"}}, "sampling_params.regex is unknown"),
        ({"input_ids": PROMPT, "sampling_params": {"temperature": -1}}, "temperature=-1.0: must be >= 0"),
        ({"input_ids": PROMPT, "sampling_params": {"temperature": 1e300}}, "temperature=1e+300: must be"),
        ({"input_ids": PROMPT, "sampling_params": {"sampling_seed": 1 << 70}}, "must be a whole number"),
        ({"input_ids": PROMPT, "sampling_params": {"logit_bias": {"9999999": 1}}}, "outside the vocabulary"),
        ({"input_ids": PROMPT, "sampling_params": {"top_k": -7}}, "top_k=-7: must be >= 0"),
        ({"input_ids": PROMPT, "sampling_params": {"top_p": 0}}, r"must be in (0, 1]"),
        ({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1.5}}, "must be a whole number"),
        ({"input_ids": [PROMPT, PROMPT], "sampling_params": [{}]}, "2 prompts, but 1 sampling_params"),
        ({"input_ids": PROMPT, "tokens": 1}, "tokens"),
    ],
)
def test_bad_requests_are_one_line(http: httpx.Client, body: dict[str, Any], message: str) -> None:
    response = http.post("/generate", json=body)
    assert response.status_code == 400
    text = response.json()["error"]["message"]
    assert message in text and "\n" not in text


def test_a_bad_request_does_not_spoil_its_batch_mates(http: httpx.Client) -> None:
    bad = http.post("/generate", json={"input_ids": [999999]})
    assert bad.status_code == 400 and "vocabulary" in bad.json()["error"]["message"]
    assert len(generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 2})["output_ids"]) > 0


def test_weights_are_updated_from_disk(folder: str, tmp_path: Path) -> None:
    other = random_qwen.build(tmp_path / "other", seed=1)
    params = {"temperature": 0, "max_new_tokens": 8}
    with rollout_server.running(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        before = generate(http, input_ids=PROMPT, sampling_params=params)
        response = http.post("/update_weights_from_disk", json={"model_path": other, "weight_version": "3"})
        assert response.json()["success"] is True
        after = generate(http, input_ids=PROMPT, sampling_params=params)
        assert http.get("/get_weight_version").json() == {"weight_version": "3"}
        missing = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path / "no")})
        assert missing.status_code == 400 and "no model folder" in missing.json()["message"]
        assert generate(http, input_ids=PROMPT, sampling_params=params)["output_ids"] == after["output_ids"]
    assert before["output_ids"] != after["output_ids"]
    assert (before["meta_info"]["weight_version"], after["meta_info"]["weight_version"]) == ("0", "3")


def test_openai_chat(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "read the numbers"}],
        "max_tokens": 6,
        "temperature": 0,
        "n": 2,
        "logprobs": True,
    }
    data = http.post("/v1/chat/completions", json=body).json()
    first, second = data["choices"]
    assert first["message"] == second["message"]
    assert first["message"]["role"] == "assistant" and first["finish_reason"] in ("stop", "length")
    assert data["usage"]["completion_tokens"] == sum(len(item["logprobs"]["content"]) for item in (first, second))
    assert data["usage"]["total_tokens"] == data["usage"]["prompt_tokens"] + data["usage"]["completion_tokens"]


def test_openai_completions_and_models(http: httpx.Client, folder: str) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == folder
    body = {"prompt": [PROMPT, [7]], "max_tokens": 4, "temperature": 0, "logprobs": 1}
    data = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in data["choices"]] == [0, 1]
    native = generate(http, input_ids=PROMPT, sampling_params={"temperature": 0, "max_new_tokens": 4})
    assert data["choices"][0]["text"] == native["text"]
    stop = native["text"][1:3]
    cut = http.post("/v1/completions", json={**body, "prompt": PROMPT, "stop": stop}).json()["choices"][0]
    assert cut["text"] == native["text"][: native["text"].find(stop)] and cut["finish_reason"] == "stop"


def test_openai_logprobs_hold_decoded_text(http: httpx.Client, folder: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 30
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30, "temperature": 0, "logprobs": True}
    answer = http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    entries = [item for item in answer["logprobs"]["content"] if not item["token"].startswith("<|")]
    raw = b"".join(bytes(item["bytes"]) for item in entries)
    assert raw.decode(errors="replace") == answer["message"]["content"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a numbers\n 😀é"
    end = tokenizer.eos_token_id
    said = Generation(text=text, token_ids=(*tokenizer.encode(text), end), finish_reason="stop")
    pieces = openai_logprobs.pieces(said.token_ids, tokenizer)
    assert b"".join(pieces) == text.encode() + tokenizer.eos_token.encode()
    shown = [openai_logprobs.shown(piece) for piece in pieces]
    assert not any("Ġ" in piece or "Ċ" in piece for piece in shown) and "\\xf0" in "".join(shown)
    place = openai_logprobs.Offsets(tokenizer)
    offsets = [place.next(*item) for item in zip(said.token_ids, pieces, strict=True)]
    assert offsets[0] == 0 and offsets[-1] == len(text) and offsets == sorted(offsets)


def test_health_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    before = _total(http, "ctrl_rollout_completion_tokens_total")
    answer = generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 4})
    assert _total(http, "ctrl_rollout_completion_tokens_total") - before == len(answer["output_ids"])


def _total(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name + " ")))


@pytest.mark.slow
def test_a_token_guards_all_but_health_and_metrics(folder: str) -> None:
    """The served application as a whole, in a process of its own."""
    code = (
        "import sys; from ctrl_hpc.rollout.server import serve; "
        "serve(sys.argv[1], token='secret', threads=1, on_ready=lambda url: print(url, flush=True))"
    )
    server = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    with httpx.Client(base_url=url, timeout=60) as http:
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}
        assert http.post("/generate", json=body).status_code == 401
        assert http.post("/update_weights_from_disk", json={"model_path": folder}).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert http.post("/generate", json=body, headers=headers).status_code == 200
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    server.stdout.close()


def test_a_port_in_use_and_a_missing_model_are_one_line(folder: str, tmp_path: Path) -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with sock, pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        serve(folder, port=port)
    with pytest.raises(ValueError, match="no model folder"):
        serve(str(tmp_path / "none"))


class BrokenEngine:
    """Fails in ways that no engine should."""

    version, max_positions, vocabulary = 0, 64, 320

    def generate(self, prompts: Any, sampling: Any, followers: Any = None) -> Any:
        raise KeyError("torn")

    def load_weights(self, folder: str, version: int) -> None:
        raise AttributeError("torn")


def test_no_exception_ends_the_model_thread(folder: str) -> None:
    with rollout_server.running(folder, BrokenEngine()) as url, httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(2):
            answer = http.post("/generate", json={"input_ids": PROMPT})
            assert answer.status_code == 500 and answer.json()["error"]["message"] == "KeyError: 'torn'"
            answer = http.post("/update_weights_from_disk", json={"model_path": folder})
            assert answer.status_code == 500 and answer.json()["error"]["message"] == "AttributeError: torn"
        assert http.get("/health").status_code == 200


def test_a_dead_model_thread_is_not_healthy(folder: str) -> None:
    worker = Worker(BrokenEngine())
    worker.close()
    worker._thread.join()
    with TestClient(create_app(RolloutService(worker, None, folder)), raise_server_exceptions=False) as http:
        assert http.get("/health").status_code == 503
        answer = http.post("/generate", json={"input_ids": PROMPT})
        assert answer.status_code == 500 and "thread has ended" in answer.json()["error"]["message"]


class HeldEngine(BrokenEngine):
    """Answers when it is let go."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.begun, self.let_go, self.error = threading.Event(), threading.Event(), error

    def generate(self, prompts: Any, sampling: Any, followers: Any = None) -> Any:
        self.begun.set()
        assert self.let_go.wait(10)
        if self.error is not None:
            raise self.error
        return [Completion(text="whole") for _ in prompts]


def test_a_closed_worker_answers_what_it_was_asked_before_and_refuses_the_rest() -> None:
    engine = HeldEngine()
    worker = Worker(engine)
    first = worker.submit([PROMPT], [Decoding()])
    assert engine.begun.wait(10)
    second = worker.submit([PROMPT], [Decoding()])
    worker.close()
    assert worker.alive
    with pytest.raises(RuntimeError, match="thread has ended"):
        worker.submit([PROMPT], [Decoding()])
    with pytest.raises(RuntimeError, match="thread has ended"):
        worker.update("folder", 1)
    engine.let_go.set()
    assert [future.result(10)[0].text for future in (first, second)] == ["whole", "whole"]
    worker._thread.join(10)
    assert not worker.alive and worker.unanswered == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_waits_for_a_thread_that_ends_is_told() -> None:
    engine = HeldEngine(SystemExit())
    worker = Worker(engine)
    asked = [worker.submit([PROMPT], [Decoding()])]
    assert engine.begun.wait(10)
    asked += [worker.submit([PROMPT], [Decoding()]), worker.update("folder", 1)]  # type: ignore[list-item]
    engine.let_go.set()
    for future in asked:
        with pytest.raises(RuntimeError, match="thread has ended"):
            future.result(10)
    worker._thread.join(10)


def test_torn_weights_are_refused_by_name(folder: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with rollout_server.running(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post("/update_weights_from_disk", json={"model_path": str(torn)})
        assert answer.status_code == 400 and str(file) in answer.json()["message"]
        assert len(generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 2})["output_ids"]) > 0


def test_sampling_parameters_of_sglang(http: httpx.Client) -> None:
    greedy = generate(http, input_ids=PROMPT, sampling_params={"temperature": 0, "max_new_tokens": 5})["output_ids"]
    first = greedy[0]

    def ids(**params: Any) -> Any:
        return generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 5, **params})["output_ids"]

    assert ids(top_k=1) == ids(min_p=1.0) == ids(temperature=0, top_k=-1, stop=None) == greedy
    assert ids(temperature=1e-9, seed=None, ignore_eos=True)[0] == first
    assert ids(temperature=0, stop_token_ids=[first]) == [first]
    assert ids(temperature=0, stop_token_ids=[first], min_new_tokens=1)[0] != first
    assert ids(temperature=0, logit_bias={str(first): -100})[0] != first
    assert ids(max_new_tokens=0) == []


def test_stop_strings_end_decoding(http: httpx.Client) -> None:
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    whole = generate(http, input_ids=PROMPT, sampling_params=params)
    stop = whole["text"][4:6]
    at = whole["text"].find(stop)
    short = generate(http, input_ids=PROMPT, sampling_params={**params, "stop": [stop, "", "never said"]})
    assert short["text"] == whole["text"][:at]
    assert short["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    count = short["meta_info"]["completion_tokens"]
    assert short["output_ids"] == whole["output_ids"][:count] and count < 40  # decoded up to the stop, no further
    later = generate(http, input_ids=PROMPT, sampling_params={**params, "stop": stop, "min_new_tokens": count + 2})
    assert later["meta_info"]["completion_tokens"] >= count + 2
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stop": stop}
    theirs = http.post("/v1/completions", json=body).json()
    assert theirs["choices"][0]["text"] == short["text"] and theirs["usage"]["completion_tokens"] == count
    assert generate(http, input_ids=PROMPT, sampling_params={**params, "stop": ""})["text"] == whole["text"]


def test_openai_bodies_as_clients_send_them(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "read "}, {"type": "text", "text": "the numbers"}]
    plain = {"temperature": 0, "max_tokens": 6}

    def chat(content: Any, **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return http.post("/v1/chat/completions", json={"messages": messages, **plain, **fields})

    expected = chat("read the numbers").json()["choices"][0]["message"]
    assert chat(parts).json()["choices"][0]["message"] == expected
    nulls = {"stop": None, "seed": None, "tools": None, "response_format": None, "stream_options": None}
    assert chat("read the numbers", **nulls).json()["choices"][0]["message"] == expected
    assert chat("read the numbers", temperature=1, top_k=1).json()["choices"][0]["message"] == expected
    unset = dict.fromkeys(("temperature", "top_p", "n", "stream", "frequency_penalty", "logit_bias"))
    assert chat("read the numbers", **unset, top_k=1).json()["choices"][0]["message"] == expected
    assert chat("read the numbers", temperature=1e-45).json()["choices"][0]["message"] == expected
    for field, wrong in (("temperature", "nan"), ("max_tokens", -1), ("top_p", -0.5), ("n", 0)):
        answer = chat("read the numbers", **{field: wrong})
        assert answer.status_code == 400, answer.text
    assert chat(None).status_code == 200
    none = chat("read the numbers", max_tokens=0).json()
    assert none["choices"][0]["message"]["content"] == "" and none["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"stream_options": {"continuous_usage_stats": True}},
        {"response_format": {"type": "json_object"}},
        {"guided_choice": ["a", "b"]},
        {"suffix": "x"},
        {"best_of": 2},
    ],
)
def test_what_is_not_served_is_refused_by_name(http: httpx.Client, field: dict[str, Any]) -> None:
    for route, asked in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("completions", {"prompt": "x"}),
    ):
        answer = http.post(f"/v1/{route}", json={**asked, "max_tokens": 2, **field})
        assert answer.status_code == 400 and next(iter(field)) in answer.json()["error"]["message"]
