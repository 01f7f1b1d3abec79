"""The padded engine against transformers' own generate and forward."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import random_qwen
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout import engine as engines
from ctrl_hpc.rollout.continuous import ContinuousEngine
from ctrl_hpc.rollout.decoding import Decoding, Follower
from ctrl_hpc.rollout.engine import PaddedEngine, load_engine, stop_token_ids
from ctrl_hpc.rollout.kv_cache import KVCache, Recent
from ctrl_hpc.seeds import derive_seed

PROMPTS = [[5, 9, 200], [7], [30, 31, 32, 33, 34, 35, 36], [5, 9, 200], [100, 101], [30, 31, 32, 33, 8], [30, 31, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_qwen.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[False, True], ids=["small", "large"])
def engine(folder: str, request: pytest.FixtureRequest) -> PaddedEngine:
    """As small models take their prompts, and as large ones do."""
    engine = load_engine(folder, device="cpu")
    assert isinstance(engine, PaddedEngine) and engine._recent is None
    if request.param:
        engine._recent = Recent(10_000)
    return engine


def sample(seed: int, **values: float) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_tokens": 24, "seed": seed, **values})  # type: ignore[arg-type]


def test_greedy_equals_transformers_generate(engine: PaddedEngine) -> None:
    out = engine.generate(PROMPTS, [Sampling(temperature=0.0, max_tokens=24)] * len(PROMPTS))
    for prompt, generation in zip(PROMPTS, out, strict=True):
        ids = torch.tensor([prompt])
        expected = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=sorted(engine.stop_ids),
        )
        assert list(generation.token_ids) == expected[0, len(prompt) :].tolist()
        assert generation.prompt_ids == tuple(prompt)


def test_a_text_that_goes_on_is_not_computed_again(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither right after, nor with other texts between, but with other weights."""
    large, plain = load_engine(folder, device="cpu"), load_engine(folder, device="cpu")
    assert isinstance(large, PaddedEngine) and isinstance(plain, PaddedEngine)
    large._recent = Recent(10_000)
    passed, forward = [], engines._Batch._forward
    monkeypatch.setattr(engines._Batch, "_forward", lambda *given: passed.append(given[2].numel()) or forward(*given))
    how = [Sampling(temperature=0.0, max_tokens=3 + row, seed=row) for row in range(len(PROMPTS))]
    begun = [[*item.prompt_ids, *item.token_ids] for item in large.generate(PROMPTS, how)]
    later = [[*text, 40 + row, 41][: len(text) + 1 + row % 2] for row, text in enumerate(begun)]
    for _ in range(2):
        passed.clear()
        found = large.generate([*later, [17, 18]], [Sampling(temperature=0.0, max_tokens=1)] * (len(later) + 1))
        assert passed == [len(later) * 3, 2], "the last token drawn, and what comes after it"
        expected = plain.generate([*later, [17, 18]], [Sampling(temperature=0.0, max_tokens=1)] * (len(later) + 1))
        assert [item.token_ids for item in found] == [item.token_ids for item in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        large.generate([[70, 71, 72]], [Sampling(temperature=0.0, max_tokens=2)])
    large.forget()
    passed.clear()
    large.generate(later[:1], [Sampling(temperature=0.0, max_tokens=1)])
    assert passed == [len(later[0])], "all of it"
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = {name: value * 1.25 for name, value in load_file(changed / "model.safetensors").items()}
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    for engine in (large, plain):
        engine.load_weights(str(changed), 1)
    greedy = [Sampling(temperature=0.0, max_tokens=4)] * len(later)
    pairs = zip(large.generate(later, greedy), plain.generate(later, greedy), strict=True)
    assert all(one.logprobs == pytest.approx(other.logprobs, abs=1e-4) for one, other in pairs)


def test_prompts_are_taken_apart_where_a_model_is_large_and_its_rotary_embedding_fixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Phi-3's longrope turns all positions by another angle once a sequence is long."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "pad_token_id": 0}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for kind, more, apart in (("qwen2", {}, True), ("phi3", {}, True), ("phi3", {"rope_parameters": long}, False)):
        config = AutoConfig.for_model(kind, **sizes, **heads, **more)
        model = AutoModelForCausalLM.from_config(config)
        assert PaddedEngine(model, frozenset())._recent is None
        monkeypatch.setattr(engines, "FILLS_A_CPU", 100)
        assert (PaddedEngine(model, frozenset())._recent is not None) == apart
        monkeypatch.undo()


def test_of_recent_rows_the_oldest_are_forgotten_first() -> None:
    recent, caches = Recent(7), [KVCache(0) for _ in range(3)]
    recent.note([1, 2, 3], caches[0])
    recent.note([1, 2], caches[1])
    assert recent.longest([1, 2, 3, 4]) is caches[0] and recent.longest([1, 2, 3]) is caches[1]
    assert recent.longest([1, 2]) is None and recent.longest([2, 1, 3]) is None
    recent.note([5, 6, 7], caches[2])  # 8 tokens: the first has to go
    assert recent.longest([1, 2, 3, 4]) is caches[1] and recent.longest([5, 6, 7, 8]) is caches[2]
    recent.note(range(9), caches[0])
    assert recent.longest([*range(9), 9]) is None and not recent._rows


def full_forward_logprobs(model: torch.nn.Module, generation: Generation, temperature: float) -> torch.Tensor:
    ids = torch.tensor([generation.prompt_ids + generation.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(generation.prompt_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_equal_a_full_forward_at_the_sampling_temperature(engine: PaddedEngine, temperature: float) -> None:
    out = engine.generate(PROMPTS, [sample(i, temperature=temperature) for i in range(len(PROMPTS))])
    for generation in out:
        expected = full_forward_logprobs(engine.model, generation, temperature)
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)


def test_a_request_is_answered_alike_alone_and_in_any_batch(engine: PaddedEngine) -> None:
    sampling = [sample(derive_seed(3, i)) for i in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, sampling)
    alone = [engine.generate([prompt], [item])[0] for prompt, item in zip(PROMPTS, sampling, strict=True)]
    backwards = engine.generate(PROMPTS[::-1], sampling[::-1])[::-1]
    small = PaddedEngine(engine.model, engine.stop_ids, max_batch_tokens=64).generate(PROMPTS, sampling)
    for others in (alone, backwards, small):
        assert [item.token_ids for item in others] == [item.token_ids for item in together]
    assert together[0].token_ids != together[3].token_ids  # the same prompt with another seed


def test_sampled_frequencies_follow_the_softmax(engine: PaddedEngine) -> None:
    count = 4000
    out = engine.generate([PROMPTS[0]] * count, [sample(i, max_tokens=1, temperature=0.8) for i in range(count)])
    with torch.no_grad():
        expected = torch.softmax(engine.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.8, -1)
    drawn = torch.bincount(torch.tensor([item.token_ids[0] for item in out]), minlength=len(expected)) / count
    error = (expected * (1 - expected) / count).sqrt()  # standard error of a frequency
    assert ((drawn - expected).abs() <= 5 * error + 1e-3).all()


def test_the_nucleus_is_the_smallest_set_of_that_mass(engine: PaddedEngine) -> None:
    with torch.no_grad():
        probs = torch.softmax(engine.model(torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    sorted_probs, order = probs.sort(descending=True)
    top_p = float(sorted_probs[:3].sum()) - 1e-4  # three tokens are needed to reach it
    out = engine.generate([PROMPTS[0]] * 300, [sample(i, max_tokens=1, top_p=top_p) for i in range(300)])
    assert {item.token_ids[0] for item in out} == set(order[:3].tolist())


def test_it_stops_at_the_stop_token_and_at_the_limits(engine: PaddedEngine) -> None:
    greedy = engine.generate([PROMPTS[0]], [Sampling(temperature=0.0, max_tokens=6)])[0]
    assert greedy.finish_reason == "length" and len(greedy.token_ids) == 6
    stop = greedy.token_ids[3]
    first = greedy.token_ids.index(stop)
    stopping = PaddedEngine(engine.model, frozenset({stop}))
    out = stopping.generate([PROMPTS[0]], [Sampling(temperature=0.0, max_tokens=6)])[0]
    assert out.finish_reason == "stop" and out.token_ids == greedy.token_ids[: first + 1]
    mixed = engine.generate([PROMPTS[0]] * 2, [Sampling(temperature=0.0, max_tokens=n) for n in (2, 5)])
    assert [item.token_ids for item in mixed] == [greedy.token_ids[:2], greedy.token_ids[:5]]
    long = [3] * 250  # the model has 256 positions
    assert len(engine.generate([long], [Sampling(temperature=0.0, max_tokens=100)])[0].token_ids) <= 6


def test_bad_prompts_are_named(engine: PaddedEngine) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[1], []], [Sampling()] * 2)
    with pytest.raises(ValueError, match="256 positions"):
        engine.generate([[1] * 256], [Sampling()])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.generate([[100000]], [Sampling()])


def test_new_weights_change_the_answers_and_the_version(folder: str, tmp_path: Path) -> None:
    engine = load_engine(folder, device="cpu")
    other = random_qwen.build(tmp_path / "other", seed=1)
    greedy = [Sampling(temperature=0.0, max_tokens=12)]
    before = engine.generate([PROMPTS[2]], greedy)[0]
    engine.load_weights(other, 4)
    after = engine.generate([PROMPTS[2]], greedy)[0]
    assert (before.version, after.version) == (0, 4)
    assert before.token_ids != after.token_ids
    assert after.token_ids == load_engine(other, device="cpu").generate([PROMPTS[2]], greedy)[0].token_ids
    engine.load_weights(folder, 5)
    assert engine.generate([PROMPTS[2]], greedy)[0].token_ids == before.token_ids


def test_weights_of_another_shape_change_nothing(engine: PaddedEngine, tmp_path: Path) -> None:
    wide = random_qwen.build(tmp_path / "wide", width=64)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with pytest.raises(ValueError, match="has shape"):
        engine.load_weights(wide, 9)
    with pytest.raises(ValueError, match="no model folder"):
        engine.load_weights(str(tmp_path / "nowhere"), 9)
    assert engine.version == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.model.state_dict().items())


def test_sharded_and_untied_folders_load(tmp_path: Path) -> None:
    first = random_qwen.build(tmp_path / "a", tied=False)
    second = random_qwen.build(tmp_path / "b", tied=False, seed=1)
    model = AutoModelForCausalLM.from_pretrained(second)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    engine = load_engine(first, device="cpu")
    engine.load_weights(str(tmp_path / "sharded"), 1)
    assert isinstance(engine, PaddedEngine)
    expected = model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in engine.model.state_dict().items())


def test_stop_ids_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert stop_token_ids(tmp_path) == {5, 7, 9}


def test_continuous_batching_answers_as_the_padded_engine(folder: str, engine: PaddedEngine) -> None:
    loaded = load_engine(folder, device="cpu", batching="continuous")
    assert isinstance(loaded, ContinuousEngine)
    continuous = ContinuousEngine(loaded.model, loaded.stop_ids, num_blocks=16, max_batch_tokens=64, page_size=16)
    greedy = [Sampling(temperature=0.0, max_tokens=8)] * 3
    expected = engine.generate(PROMPTS[:3], greedy)
    got = continuous.generate(PROMPTS[:3], greedy)
    assert [item.token_ids for item in got] == [item.token_ids for item in expected]
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    one_of_two = [Decoding(max_tokens=1, seed=seed, logit_bias=((3, 100.0), (7, 100.0))) for seed in (1, 2, 3)]
    for a, b in zip(
        continuous.generate(PROMPTS[:3], one_of_two), engine.generate(PROMPTS[:3], one_of_two), strict=True
    ):
        assert a.token_ids == b.token_ids and a.token_ids[0] in (3, 7)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    followers = [Follower(), Follower()]
    followers[1].aborted = True  # runs to its end, but is not given as whole
    marked = continuous.generate(PROMPTS[:2], greedy[:2], followers)
    assert [item.finish_reason for item in marked] == [expected[0].finish_reason, "abort"]


def test_an_unknown_way_of_batching_lists_the_choices(folder: str) -> None:
    with pytest.raises(ValueError, match="allowed: auto, padded, continuous"):
        load_engine(folder, device="cpu", batching="other")


def test_bfloat16_weights_are_served_as_such_with_float32_logits(folder: str, tmp_path: Path) -> None:
    """Log-probs are those of a float32 output layer over the bfloat16 network, before and after an update."""
    halves = []
    for seed in (0, 1):
        place = tmp_path / f"half{seed}"
        shutil.copytree(folder, place)
        source = folder if seed == 0 else random_qwen.build(tmp_path / "other", seed=1)
        tensors = load_file(Path(source) / "model.safetensors")
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, place / "model.safetensors")
        halves.append(str(place))
    half = load_engine(halves[0], device="cpu", dtype="bfloat16")
    assert isinstance(half, PaddedEngine) and half.model.dtype == torch.bfloat16
    for number, place in enumerate(halves):
        if number:
            half.load_weights(place, number)
        (made,) = half.generate([PROMPTS[0]], [sample(1)])
        head_VD = load_file(Path(place) / "model.safetensors")["model.embed_tokens.weight"].float()
        ids = torch.tensor([made.prompt_ids + made.token_ids])
        with torch.no_grad():
            hidden_TD = half.model.base_model(ids).last_hidden_state[0, len(made.prompt_ids) - 1 : -1].float()
        logprobs_TV = torch.log_softmax(hidden_TD @ head_VD.T, -1)
        expected = logprobs_TV.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0]
        # what is left is the network's own rounding: with a cache it adds in another order
        assert torch.allclose(torch.tensor(made.logprobs), expected, atol=0.1)


def test_the_type_is_the_folders_own_where_it_pays(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(stored: str, has: bool) -> torch.dtype:
        monkeypatch.setattr(engines, "stored_dtype", lambda _: stored)
        monkeypatch.setattr(engines, "cpu_has_bfloat16", lambda: has)
        loaded: Any = load_engine(folder, device="cpu")
        return loaded.model.dtype

    assert dtype("BF16", True) == torch.bfloat16
    assert dtype("BF16", False) == dtype("F32", True) == dtype("F16", True) == torch.float32
    with pytest.raises(ValueError, match=r"rollout\.dtype=float8: allowed: auto, float32, bfloat16"):
        load_engine(folder, device="cpu", dtype="float8")
