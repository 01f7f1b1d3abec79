"""What training does: the same curve in every layout, exact resumption, learning, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron_jobs import spawn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def behaviour(workplace: Path) -> dict[str, Any]:
    """Facts about one policy in one process."""
    spawn("ranks", "behaviour", workplace)
    return json.loads((workplace / "behaviour.json").read_text())


@pytest.fixture(scope="module")
def curves(workplace: Path) -> dict[str, list[float]]:
    """Losses of 20 optimizer steps: one process, TP 2 x DP 2, and moved from TP 2 to TP 1 to TP 4 on the way.

    The sharded ones with a distributed optimizer.
    """
    for ranks in (1, 4):
        spawn("ranks", "curve", workplace, ranks)
    return {
        **json.loads((workplace / "curve-1.json").read_text()),
        **json.loads((workplace / "curve-4.json").read_text()),
    }


@pytest.mark.parametrize("layout", ["tp2-dp2", "tp2-dp2-sharded", "moved", "moved-sharded"])
def test_twenty_steps_in_parallel_follow_the_curve_of_one_process(curves: dict[str, list[float]], layout: str) -> None:
    assert curves[layout] == pytest.approx(curves["single"], rel=1e-5)


def test_the_loss_of_sft_falls(curves: dict[str, list[float]]) -> None:
    assert curves["single"][-1] < 0.7 * curves["single"][0]


def test_a_checkpoint_resumes_to_the_bit(behaviour: dict[str, Any]) -> None:
    assert behaviour["resumed_at"] == 3
    assert behaviour["resumed_same_bits"] and behaviour["random_restored"]
    assert behaviour["bfloat16"] == ["torch.bfloat16"] and behaviour["bfloat16_same_bits"]


def test_a_save_in_the_background_does_not_hold_up_training_nor_see_it(behaviour: dict[str, Any]) -> None:
    assert not behaviour["saved_too_early"]
    assert behaviour["background_same_bits"]


def test_the_newest_checkpoints_are_kept(behaviour: dict[str, Any]) -> None:
    assert behaviour["kept"] == ["step-000002", "step-000003"]


def test_micro_batches_do_not_change_the_gradient(behaviour: dict[str, Any]) -> None:
    assert behaviour["micro_batching_error"] <= 1e-5


def test_a_swapped_reference_is_the_copied_one_and_leaves_the_policy(behaviour: dict[str, Any]) -> None:
    assert behaviour["policy_moved"]
    assert behaviour["reference_is_fixed"] and behaviour["policy_untouched_by_swap"]


def test_a_gradient_that_is_not_finite_stops_before_the_update(behaviour: dict[str, Any]) -> None:
    assert behaviour["not_finite"].startswith("the gradient norm is nan (")
    assert behaviour["untouched_by_nan"]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_rl_update_moves_log_probs_with_the_advantage(behaviour: dict[str, Any], ratio: str) -> None:
    assert behaviour[f"rl_moves_{ratio}"]
    wanted = {"kl", "clip_fraction", "approx_kl", "entropy", "rollout_kl", "grad_norm", "lr", "loss"}
    assert wanted <= set(behaviour[f"rl_logged_{ratio}"])


@pytest.mark.parametrize("model", ["qwen2-tied", "qwen2-untied"])
def test_a_value_network_starts_at_zero_and_learns(behaviour: dict[str, Any], model: str) -> None:
    assert behaviour[f"value_{model}"] == {"zero_at_first": True, "falls": True, "tells_apart": True}


def test_a_value_network_is_part_of_the_checkpoint(behaviour: dict[str, Any]) -> None:
    assert behaviour["value_resumes"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", ["nowhere", "not a Hugging Face model folder"]),
        ("no_weights", ["broken", "model.safetensors"]),
        ("unsupported", ["model_type 'gpt2'", "qwen2, qwen3, llama"]),
        ("wrong_checkpoint", ["step-000003", "does not fit this critic"]),
        ("too_long", ["trainer.micro_batch_tokens=64", "119 tokens"]),
        ("ranks", ["parallel.tensor x parallel.pipeline = 2 x 1", "3 ranks"]),
        ("sequence", ["parallel.sequence: true", "parallel.tensor"]),
    ],
)
def test_what_cannot_work_is_one_line_that_names_it(behaviour: dict[str, Any], case: str, words: list[str]) -> None:
    said = behaviour["refused"][case]
    assert "\n" not in said
    assert all(word in said for word in words), said
