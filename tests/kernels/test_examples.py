"""The examples for users of TRL and verl: their own losses and gradients, and a step of training."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_oracle import relative_error

EXAMPLES = Path(__file__).parents[2] / "kernels" / "examples"
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnop"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Other people's code allocates here, too."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def tiny_model(folder: Path) -> torch.nn.Module:
    """Random, the same each time, and loaded from a folder, as TRL wants it for a reference model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def trainer(kind: type, model: torch.nn.Module, folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=1,
        report_to=[], use_cpu=True, logging_steps=1, learning_rate=1e-2, save_strategy="no", seed=1,
        bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h"]})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(index % 2) + len(text) / 50 for index, text in enumerate(completions)]

    return kind(
        model=model, reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1, 3:], mask[2, 5:] = 0, 0
    return {
        "prompt_ids": torch.randint(2, len(WORDS), (4, 3), generator=generator),
        "prompt_mask": torch.ones(4, 3, dtype=torch.int64),
        "completion_ids": torch.randint(2, len(WORDS), (4, 6), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": -2.8 + 0.3 * torch.randn(4, 6, generator=generator),
        "ref_per_token_logps": -2.8 + 0.3 * torch.randn(4, 6, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_gives_the_same_loss_and_gradients(loss_type: str, level: str, tmp_path: Path, example: Any) -> None:
    from trl import GRPOTrainer

    ours = example("trl_grpo").KernelGRPOTrainer
    found = []
    for kind in (ours, GRPOTrainer):
        own = trainer(
            kind, tiny_model(tmp_path / "model").double(), tmp_path, beta=0.1, loss_type=loss_type,
            importance_sampling_level=level, epsilon_high=0.28, temperature=0.9,
        )  # fmt: skip
        own.model.train()
        own.current_gradient_accumulation_steps = 2
        loss = own._compute_loss(own.model, batch())
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in own.model.parameters() if p.grad is not None])
        found.append((loss.item(), gradients))
    (loss, gradients), (expected, wanted) = found
    assert loss == pytest.approx(expected, rel=1e-6, abs=5e-8)  # of terms near 1, which cancel, partly in fp32
    assert relative_error(gradients, wanted) < 1e-6


@pytest.mark.slow
def test_trl_trains(tmp_path: Path, example: Any) -> None:
    model = tiny_model(tmp_path / "model")
    before = model.lm_head.weight.detach().clone()
    own = trainer(example("trl_grpo").KernelGRPOTrainer, model, tmp_path, loss_type="grpo")
    own.train()
    assert not torch.equal(own.model.lm_head.weight.detach().cpu(), before)
    logged = next(entry for entry in own.state.log_history if "loss" in entry)
    assert math.isfinite(logged["loss"]) and logged["entropy"] > 1.0


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verl_loss(aggregation: str, example: Any) -> None:
    """verl's formula, as its ``vanilla`` loss has it, with the batch's global numbers."""
    generator = torch.Generator().manual_seed(1)
    old, step, advantages = torch.randn(3, 3, 5, generator=generator)
    weights = torch.rand(3, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    logp = (old + step).requires_grad_()
    shared = {"batch_num_tokens": 40, "global_batch_size": 12, "dp_size": 4}
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, global_batch_info=shared)
    config.get = lambda name, default: default
    loss, metrics = example("verl_loss").policy_loss(
        old, logp, advantages, mask, loss_agg_mode=aggregation, config=config, rollout_is_weights=weights
    )
    ratio = (logp - old).exp()
    worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    terms = torch.where(advantages < 0, torch.minimum(worst, -3 * advantages), worst) * weights * mask
    if aggregation == "token-mean":
        expected = terms.sum() / 40 * 4
    elif aggregation == "seq-mean-token-sum":
        expected = terms.sum() / 12 * 4
    else:
        expected = (terms.sum(1) / mask.sum(1)).sum() / 12 * 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got, wanted = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, expected))
    assert relative_error(got, wanted) < 1e-6
    assert metrics["actor/ppo_kl"] == pytest.approx((-(step * mask).sum() / mask.sum()).item(), rel=1e-5)
