"""SmolLM2-135M-Instruct, real weights of a real architecture and vocabulary: every stage runs on it, and the server
says what transformers says. It learns nothing in so few tokens; what is asserted is that all is as it was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import real_weights
import rollout_server
import torch
from process_table import processes_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT
from ctrl_hpc.flow.filters import Rejected
from ctrl_hpc.records import Critique, Message, Sampling, Solution
from ctrl_hpc.rollout.client import RolloutClient
from ctrl_hpc.rollout.engine import load_engine
from ctrl_hpc.train.rollouts import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CONFIG = ROOT / "configs" / "qwen25_coder_05b.yaml"
TASKS = {  # MBPP's form and numbers: from 601 on its training problems, from 11 on those of its test
    601: ("add two numbers", "add", "a, b", "a + b", "add(1, 2) == 3"),
    602: ("find the larger of two numbers", "larger", "a, b", "max(a, b)", "larger(1, 2) == 2"),
    603: ("reverse a string", "reverse", "s", "s[::-1]", "reverse('ab') == 'ba'"),
    604: ("count the vowels of a word", "vowels", "w", "sum(c in 'aeiou' for c in w)", "vowels('house') == 3"),
    11: ("square a number", "square", "x", "x * x", "square(3) == 9"),
    12: ("sum the items of a list", "total", "items", "sum(items)", "total([1, 2]) == 3"),
}
SMALL = [
    "data.n_eval=2",
    "sample.n_samples=1",
    "sample.max_tokens=64",
    "synthesize.max_tokens=56",
    "synthesize.balance=false",  # a critic of this size judges by chance
    "synthesize.consistent_only=false",
    "sft.batch_size=2",
    "rl.steps=2",
    "rl.prompts_per_step=2",
    "rl.group_size=8",
    "rl.max_tokens=56",
    "rl.max_revision_tokens=64",
    "rl.max_prompt_tokens=400",
    "rl.verdict_only_share=0.5",
    "rl.kl_coef=1.0e-3",  # of adapters, the reference is the same model without them
    "eval.max_tokens=64",
    "eval.critics=[none,rl]",
    "wandb.services=false",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return real_weights.smollm2(tmp_path_factory.mktemp("smollm2"), "bfloat16")


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of the shipped configuration for real weights on two cores, with fewer and shorter everything."""
    folder = tmp_path_factory.mktemp("run")
    problems = [
        {
            "task_id": number,
            "text": f"Write a function to {text}.",
            "code": f"def {name}({arguments}):\n    return {expression}",
            "test_list": [f"assert {test}"],
        }
        for number, (text, name, arguments, expression, test) in TASKS.items()
    ]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    places = [f"critic.model={model}", f"generator={model}", f"run_dir={folder}/run"]
    places += [f"data.path={folder}/mbpp.jsonl", f"data.eval_path={folder}/mbpp.jsonl"]
    command = [sys.executable, "-m", "ctrl_hpc.cli", "run", str(CONFIG), *places, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    yield folder / "run"
    assert processes_of(folder) == []


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_stage_leaves_records_that_fit_together(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "sft" / "hf")
    drafts = {item.id: item for item in jsonl.read(Solution, finished / "sample" / "solutions.jsonl")}
    assert sorted(drafts) == [f"mbpp/{number}/0" for number in TASKS if number > 600]
    assert all(item.verdict is not None and item.verdict.status != "sandbox_error" for item in drafts.values())
    critiques = jsonl.read(Critique, finished / "synthesize" / "critiques.jsonl")
    rejected = jsonl.read(Rejected, finished / "synthesize" / "rejected.jsonl")
    assert sorted(item.solution_id for item in [*critiques, *(item.critique for item in rejected)]) == sorted(drafts)
    for item in critiques:
        assert item.text.startswith("Analysis:") and item.generation is not None and item.judgement is not None
        if item.generation.forced is not None:
            assert item.text.endswith(f"\n\nOverall judgment: {item.judgement.capitalize()}")
    steps = [json.loads(line) for line in (finished / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1]
    assert steps[0]["rl/kl"] == 0.0
    assert steps[0]["rl/skipped_groups"] == 2 or steps[1]["rl/kl"] > 0.0  # without spread there is nothing to learn
    assert all(step["rl/groups"] + step["rl/skipped_groups"] == 2 for step in steps)
    for number, step in enumerate(steps):
        rollouts = jsonl.read(Rollout, finished / "rl" / "rollouts" / f"step-{number:06d}.jsonl.gz")
        assert len(rollouts) == 16 and {item.solution_id for item in rollouts} <= set(drafts)
        assert step["rl/reward"] == pytest.approx(sum(item.reward for item in rollouts) / 16)
        assert sum(item.reason.startswith("verdict_") for item in rollouts) == 8
        assert {item.version for item in rollouts} == {number}  # step 1 is sampled by what step 0 has published
        for item in rollouts:
            assert len(item.token_ids) == len(item.logprobs) <= 56
            if item.forced is not None:
                assert set(item.logprobs[slice(*item.forced)]) == {0.0}
            written = tokenizer.decode(item.token_ids, skip_special_tokens=True)
            assert item.judgement is not None or written.count("udgment:") > 1  # or two that disagree


def test_only_the_layers_with_adapters_have_learnt(finished: Path, model: str) -> None:
    base, sft, rl = (_weights(folder) for folder in (Path(model), finished / "sft" / "hf", finished / "rl" / "hf"))
    assert base.keys() == sft.keys() == rl.keys()
    changed = {name for name in base if not torch.equal(base[name], sft[name])}
    assert changed == {name for name in base if "_proj." in name}
    again = {name for name in base if not torch.equal(sft[name], rl[name])}
    spread = [json.loads(line)["rl/groups"] for line in (finished / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert again <= changed and (len(again) > len(changed) / 2) == any(spread)
    adapters = load_file(finished / "rl" / "adapters" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in adapters.values()) == 30 * 16 * (
        3 * 576 + 960 + 2 * 576 + 2 * 576 + 2 * 1536 + 1536 + 576
    )


def test_the_report_tells_of_the_run(finished: Path) -> None:
    results = json.loads((finished / "report" / "results.json").read_text())
    mbpp = results["datasets"]["mbpp"]
    assert mbpp["n_problems"] == 2 and set(mbpp["critics"]) == {"none", "rl"}
    for row in mbpp["critics"].values():
        assert row["pass_at_1"][1] == pytest.approx(row["pass_at_1"][0] + row["delta_up"] - row["delta_down"])
    assert [point["step"] for point in results["learning_curve"]] == [1, 2]
    assert set(results["wall_time_s"]) >= {"sample", "synthesize", "sft", "rl", "eval"}
    assert "mbpp" in (finished / "report" / "index.html").read_text()


def test_the_server_says_what_transformers_says(model: str) -> None:
    """Greedy, in fp32, prompts of several lengths in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        (Message(role="user", content=said),)
        for said in ("Count to five.", "Write a Python function that adds two numbers.", f"Repeat: {'one two ' * 20}")
    ]
    with rollout_server.running(model, load_engine(model, dtype="float32")) as url:
        client = RolloutClient(lambda: [url], tokenizer)
        answers = client.complete(chats, Sampling(temperature=0.0, max_tokens=24))
        client.close()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for chat, (answer,) in zip(chats, answers, strict=True):
        messages = [{"role": message.role, "content": message.content} for message in chat]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = network.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer.prompt_ids == tuple(ids["input_ids"][0].tolist())
        assert answer.token_ids == tuple(out.tolist())
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
