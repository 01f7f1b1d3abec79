"""The rollout server as programs of the field use it: openai, litellm, lm-eval, and the requests of slime and verl."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest
import random_qwen
import rollout_server
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctrl_hpc.rollout.streaming import TextStream

PROMPT = [5, 9, 200]
CHAT = [{"role": "user", "content": "read the numbers"}]
LONG = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
"""A completion that takes seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_qwen.build(tmp_path_factory.mktemp("model"), positions=4096)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def url(folder: str) -> Iterator[str]:
    with rollout_server.running(folder) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reference(folder: str) -> Any:
    """Log-probs ``[T - 1, V]`` of a text's tokens after the first, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)

    return logprobs


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_a_streamed_chat_says_what_a_whole_one_says(client: openai.OpenAI, folder: str) -> None:
    asked: Any = {"model": folder, "messages": CHAT, "max_tokens": 30, "temperature": 1.0, "seed": 5, "n": 2}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    texts, roles, reasons, tokens = ["", ""], [0, 0], ["", ""], [[], []]  # type: ignore[var-annotated]
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk" and usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices] and roles == [1, 1]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert usage == whole.usage
    for entry in tokens[0]:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.logprob
        assert bytes(entry.bytes).decode(errors="backslashreplace") == entry.token


def test_streamed_completions_end_before_their_stop_string(client: openai.OpenAI, folder: str) -> None:
    asked: Any = {"model": folder, "prompt": [PROMPT, [7, 8]], "max_tokens": 40, "temperature": 0, "logprobs": 1}
    stop = client.completions.create(**asked).choices[0].text[3:6]
    whole = client.completions.create(**asked, stop=[stop])
    texts, offsets = ["", ""], [[], []]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**asked, stop=[stop], stream=True):
        assert chunk.object == "text_completion" and chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices] and stop not in texts[0]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]


def test_text_streams_hold_back_what_may_become_a_stop_string(tokenizer: Any) -> None:
    text = "print 😀 the suXm é"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, ["uXY", "absent"])
    parts = [stream.add(token) for token in ids]
    assert "�" not in "".join(parts) and all("print 😀 the s".startswith(p) or "X" not in p or "uX" in p for p in parts)
    assert "".join(parts) + stream.end(text) == text
    held = TextStream(tokenizer, ["é!"])
    assert "".join(map(held.add, ids)) == text[:-1] and held.end(text) == "é"
    stopped = TextStream(tokenizer, ["suX"])
    assert "".join(map(stopped.add, ids)) == "print 😀 the " and stopped.end("print 😀 the ") == ""


def test_errors_of_a_stream_come_as_errors(client: openai.OpenAI, folder: str) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=folder, prompt=[999999], stream=True)
    with pytest.raises(openai.BadRequestError, match="echo=true is not served with stream=true"):
        client.completions.create(model=folder, prompt="x", stream=True, echo=True)
    with pytest.raises(openai.BadRequestError, match="top_logprobs asks for logprobs=true"):
        client.chat.completions.create(model=folder, messages=CHAT, top_logprobs=2)  # type: ignore[arg-type]
    assert client.models.retrieve(folder).id == folder
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_an_echoed_prompt_has_the_models_log_probs(
    client: openai.OpenAI, folder: str, tokenizer: Any, reference: Any
) -> None:
    text = "print the sum é of 12"
    ids = tokenizer.encode(text)
    choice = client.completions.create(
        model=folder, prompt=text, max_tokens=2, temperature=0, logprobs=3, echo=True, extra_body={"ignore_eos": True}
    ).choices[0]
    told: Any = choice.logprobs
    assert choice.text.startswith(text) and len(told.tokens) == len(ids) + 2
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    whole = [pair for pair in zip(told.text_offset, told.tokens, strict=True) if "\\" not in pair[1]]
    assert len(whole) > 5 and all(choice.text[at:].startswith(token) for at, token in whole)
    expected_TV = reference(ids)
    for position, token in enumerate(ids[1:]):
        assert told.token_logprobs[position + 1] == pytest.approx(float(expected_TV[position, token]), abs=1e-4)
        likeliest = max(told.top_logprobs[position + 1].values())
        assert likeliest == pytest.approx(float(expected_TV[position].max()), abs=1e-4)
    alone = client.completions.create(model=folder, prompt=ids, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert alone.text == text and alone.logprobs.token_logprobs == told.token_logprobs[: len(ids)]  # type: ignore[union-attr]


def test_prompts_are_scored_as_sglang_does(http: httpx.Client, tokenizer: Any, reference: Any) -> None:
    ids = tokenizer.encode("keep the even ones 0123")
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 2}, "return_logprob": True}
    asked = {**body, "logprob_start_len": 2, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = http.post("/generate", json=asked).json()["meta_info"]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == ids[2:]
    assert meta["input_token_logprobs"][0][0] is None and meta["input_top_logprobs"][0] is None
    expected_TV = reference(ids)
    for position in range(3, len(ids)):
        value, token, text = meta["input_token_logprobs"][position - 2]
        assert value == pytest.approx(float(expected_TV[position - 1, token]), abs=1e-4)
        assert text == tokenizer.decode([token])
        likeliest = [token for _, token, _ in meta["input_top_logprobs"][position - 2]]
        assert likeliest == expected_TV[position - 1].topk(2)[1].tolist()
    assert all(pair[0][0] >= pair[1][0] for pair in meta["output_top_logprobs"])
    assert "input_token_logprobs" not in http.post("/generate", json=body).json()["meta_info"]
    wrong = http.post("/generate", json={**body, "logprob_start_len": 99})
    assert wrong.status_code == 400 and "logprob_start_len=99" in wrong.json()["error"]["message"]


def test_a_native_stream_says_the_text_so_far(http: httpx.Client) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}}
    whole = http.post("/generate", json=body).json()
    with http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        answers = list(events(response))
    assert len(answers) == 21 and answers[-1]["text"] == whole["text"]
    assert answers[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    assert [len(item["output_ids"]) for item in answers] == [*range(1, 21), 20]
    assert all(whole["text"].startswith(item["text"]) for item in answers)


def test_requests_are_aborted_by_their_id_or_by_leaving(http: httpx.Client) -> None:
    body = {"input_ids": PROMPT, "sampling_params": LONG, "stream": True, "rid": "mine"}
    with http.stream("POST", "/generate", json=body) as response:
        answers = events(response)
        assert next(answers)["meta_info"]["id"] == "mine"
        assert http.post("/abort_request", json={"rid": "another"}).status_code == 200
        assert http.post("/abort_request", json={"rid": "mine"}).status_code == 200
        *_, last = answers
    assert last["meta_info"]["finish_reason"]["type"] == "abort" and last["meta_info"]["completion_tokens"] < 4000
    with http.stream("POST", "/generate", json=body) as response:
        next(events(response))
    for _ in range(100):
        if http.get("/v1/loads").json()["num_reqs"] == 0:
            break
        time.sleep(0.05)
    assert http.get("/v1/loads").json()["num_reqs"] == 0
    assert _total(http, "ctrl_rollout_completion_tokens_total") < 8000
    assert http.post("/abort_request", json={}).status_code == 400


def _total(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name + " ")))


def test_slimes_requests(http: httpx.Client, folder: str) -> None:
    """Its rollout's body, then an update of the weights: pause, flush, update, continue."""
    params = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 8,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "sampling_seed": 1234,
    }
    body = {"sampling_params": params, "return_logprob": True, "input_ids": PROMPT}
    answer = http.post("/generate", json=body).json()
    pairs = answer["meta_info"]["output_token_logprobs"]
    assert [item[1] for item in pairs] == answer["output_ids"] and all(item[0] <= 0 for item in pairs)
    assert answer["meta_info"]["finish_reason"]["type"] in ("stop", "length")
    assert answer["meta_info"]["weight_version"] == "0" and answer["meta_info"]["cached_tokens"] == 0
    custom = http.post("/generate", json={**body, "sampling_params": {**params, "custom_params": {"x": 1}}})
    assert custom.status_code == 400 and "custom_params" in custom.json()["error"]["message"]

    assert http.get("/health_generate").status_code == 200
    assert http.post("/pause_generation", json={}).status_code == 200
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(http.post("/generate", json=body).json()))
    thread.start()
    while http.get("/v1/loads?include=core,disagg,queues").json()["num_reqs"] == 0:
        time.sleep(0.01)
    assert http.get("/flush_cache").status_code == 200 and http.get("/server_info").json()["paused"] is True
    update = {"model_path": folder, "load_format": None, "flush_cache": True, "weight_version": "7"}
    assert http.post("/update_weights_from_disk", json=update).json()["success"] is True
    assert waiting == [] and http.get("/get_weight_version").json() == {"weight_version": "7"}
    assert http.post("/continue_generation", json={}).status_code == 200
    thread.join(30)
    assert waiting[0]["output_ids"] == answer["output_ids"] and waiting[0]["meta_info"]["weight_version"] == "7"

    http.post("/pause_generation", json={"mode": "abort"})
    thread = threading.Thread(target=lambda: waiting.append(http.post("/generate", json=body).json()))
    thread.start()
    while http.get("/get_load").json()["num_reqs"] == 0:
        time.sleep(0.01)
    http.post("/abort_request", json={"abort_all": True})
    thread.join(30)
    assert waiting[1]["meta_info"]["finish_reason"]["type"] == "abort" and waiting[1]["output_ids"] == []
    assert http.post("/pause_generation", json={"mode": "retract"}).status_code == 400
    http.post("/continue_generation", json={})


def test_what_is_shown_of_a_completion(http: httpx.Client, tokenizer: Any) -> None:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    whole = http.post("/generate", json={"input_ids": PROMPT, "sampling_params": params}).json()
    stop = whole["text"][2:4]
    end = whole["text"].index(stop)
    shown = {**params, "stop": stop, "no_stop_trim": True}
    assert http.post("/generate", json={"input_ids": PROMPT, "sampling_params": shown}).json()["text"] == (
        whole["text"][:end] + stop
    )
    biased = {**params, "logit_bias": {str(tokenizer.eos_token_id): 100}, "max_new_tokens": 2}
    for skip, text in ((True, ""), (False, tokenizer.eos_token * 2)):
        body = {"input_ids": PROMPT, "sampling_params": {**biased, "skip_special_tokens": skip}}
        assert http.post("/generate", json=body).json()["text"] == text


def test_verls_requests(http: httpx.Client) -> None:
    """Those of its adapter of SGLang's HTTP server, its nulls included."""
    unset = dict.fromkeys(("image_data", "lora_path", "token_ids_logprob", "custom_logit_processor"))
    body = {"text": None, "sampling_params": {"temperature": 0, "max_new_tokens": 3, "n": 1}, "input_ids": PROMPT}
    logprobs = {"return_logprob": True, "logprob_start_len": None, "top_logprobs_num": None}
    answer = http.post("/generate", json={**body, **logprobs, **unset})
    assert answer.status_code == 200 and len(answer.json()["output_ids"]) <= 3
    assert http.get("/flush_cache", params={"reset_connector": "true"}).status_code == 200
    assert http.post("/abort_request", json={"rid": "", "abort_all": True}).status_code == 200
    for name, given in {
        "release_memory_occupation": {"tags": None, "reset_connector": True},
        "resume_memory_occupation": {"tags": ["weights"]},
        "update_weights_from_tensor": {"serialized_named_tensors": [], "load_format": None, "flush_cache": False},
    }.items():
        refused = http.post(f"/{name}", json=given)
        assert refused.status_code == 400 and f"{name} is not served here: " in refused.json()["error"]["message"]
    wrong = http.post("/update_weights_from_disk", json={"model_path": "x", "weight_version": "step-3"})
    assert wrong.status_code == 400 and "weight_version='step-3'" in wrong.json()["error"]["message"]
    info = http.get("/get_server_info").json()
    assert info["context_length"] == 4096 and info["model_path"] == info["served_model_name"]


@pytest.mark.slow
def test_litellm(url: str, client: openai.OpenAI, folder: str) -> None:
    with mock.patch.dict(os.environ, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}):
        litellm = pytest.importorskip("litellm", reason="scripts/setup-tests installs litellm")
        asked: Any = {"model": f"openai/{folder}", "messages": CHAT, "max_tokens": 12, "temperature": 0}
        asked |= {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
        whole = litellm.completion(**asked)
        parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
        with pytest.raises(litellm.BadRequestError, match="tools"):
            litellm.completion(**asked, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    expected = client.chat.completions.create(model=folder, messages=CHAT, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == "".join(parts) == expected.choices[0].message.content


@pytest.mark.slow
def test_lm_eval(url: str, folder: str, tokenizer: Any, reference: Any, tmp_path: Path) -> None:
    """Its evaluator on two tasks of ours: loglikelihoods of choices, and text up to a stop string."""
    questions = [{"q": "print the", "a": " sum", "b": " even numbers"}, {"q": "keep", "a": " incorrect", "b": " the"}]
    (tmp_path / "data.json").write_text(json.dumps(questions))

    def score(question: str, choice: str) -> float:
        context = tokenizer.encode(question)
        ids = context + tokenizer.encode(question + choice)[len(context) :]
        logprobs_TV = reference(ids)
        return sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(len(context), len(ids)))

    right = [score(item["q"], item["a"]) > score(item["q"], item["b"]) for item in questions]
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "data.json")}}
    common = {**data, "test_split": "train", "doc_to_text": "{{q}}", "target_delimiter": ""}
    choices = {**common, "task": "choices", "output_type": "multiple_choice", "doc_to_target": 0}
    choices |= {"doc_to_choice": "{{[a, b]}}", "metric_list": [{"metric": "acc"}]}
    ends = {**common, "task": "ends", "output_type": "generate_until", "doc_to_target": "x"}
    ends |= {"generation_kwargs": {"until": ["e"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}]}
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, home):
        lm_eval = pytest.importorskip("lm_eval", reason="scripts/setup-tests installs lm-eval")
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        model = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model=folder, tokenizer_backend="huggingface", batch_size=4
        )
        tasks = [ConfigurableTask(config=dict(item)) for item in (choices, ends)]
        found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True)
    assert found["results"]["choices"]["acc,none"] == sum(right) / 2
    for item, sample in zip(questions, found["samples"]["choices"], strict=True):
        told = [float(value) for (value, _), *_ in sample["resps"]]
        assert told == pytest.approx([score(item["q"], item["a"]), score(item["q"], item["b"])], abs=1e-3)
    for item, sample in zip(questions, found["samples"]["ends"], strict=True):
        asked: Any = {"prompt": item["q"], "max_tokens": 12, "temperature": 0, "stop": ["e"]}
        expected = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]
        assert sample["resps"][0][0] == expected
