"""Losses of other libraries beside ours, each as its own code computes it: values and gradients, in one table.

    python kernels/bench/parity.py [--slime DIR] [--prime-rl DIR] [--nemo-rl DIR] [--backend triton]

verl is imported where it is installed; of the others, which are no packages, the functions are read from a checkout of
their sources and run as they stand. TRL is compared by its own trainer, in ``tests/kernels/test_examples.py``. Inputs
are fp32; the numbers are |a - b| / |b| of the loss and of its gradient. Where definitions agree both are below 1e-6;
where they do not, the row says why. Exit code 1 if a row without a reason is above.
"""

from __future__ import annotations

import argparse
import ast
import enum
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # ctrl_kernels, where the project is not installed

import torch

import ctrl_kernels

Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Case = tuple[
    str, Loss, dict[str, Any], str
]  # what it is called, theirs, our options, why they differ ("" if they agree)
SEQUENCES, STEPS = 6, 40
AGREEMENT = 1e-6
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def inputs() -> dict[str, torch.Tensor]:
    """Ratios far on both sides of 1, advantages of both signs, ragged masks."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(SEQUENCES, STEPS, generator=generator)

    lengths = torch.tensor([40, 3, 17, 1, 25, 33])
    old = -normal().abs() - 0.05
    return {
        "old_logprobs": old,
        "logprobs": (old + 0.4 * normal()).clamp_max(-0.01),
        "ref_logprobs": (old + 0.2 * normal()).clamp_max(-0.01),
        "advantages": normal()[:, :1].expand(SEQUENCES, STEPS).contiguous(),
        "token_advantages": normal(),
        "importance_weights": normal().exp(),
        "mask": torch.arange(STEPS) < lengths[:, None],
    }


def from_sources(names: dict[Path, tuple[str, ...]], **given: Any) -> SimpleNamespace:
    """Functions and classes of these names as their files define them, without decorators."""
    found: dict[str, Any] = {"torch": torch, "Any": Any, **given}
    for path, wanted in names.items():
        tree = ast.parse(path.read_text())
        nodes = [x for x in tree.body if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name in wanted]
        if len(nodes) != len(wanted):
            raise ValueError(f"{path} does not define all of {', '.join(wanted)}")
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
        future = ast.parse("from __future__ import annotations").body
        exec(compile(ast.Module(body=[*future, *nodes], type_ignores=[]), str(path), "exec"), found)
    return SimpleNamespace(**found)


def mean(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over unmasked tokens."""
    return terms[mask].sum() / mask.sum()


def verl() -> Iterator[Case]:
    """``verl.trainer.ppo.core_algos``, with its own configuration object."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    def theirs(
        name: str, aggregation: str, advantages: str = "advantages", *, weighted: bool = False, **set: Any
    ) -> Loss:
        config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **set)
        function = get_policy_loss_fn(name)

        def loss(x: dict[str, torch.Tensor]) -> torch.Tensor:
            weights = x["importance_weights"] if weighted else None
            arguments = (x["old_logprobs"], x["logprobs"], x[advantages], x["mask"], aggregation)
            return function(*arguments, config=config, rollout_is_weights=weights)[0]

        return loss

    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    ours: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
    for a in AGGREGATIONS:
        weighted = {"aggregation": a, "weighted": True, "advantages": "token_advantages"}
        yield f"vanilla, {a}", theirs("vanilla", a, "token_advantages", weighted=True, **clip), {
            **ours, "dual_clip": 3.0, **weighted
        }, ""  # fmt: skip
        yield f"cispo, {a}", theirs("cispo", a, "token_advantages", weighted=True, **clip), {
            **ours, "objective": "cispo", **weighted
        }, ""  # fmt: skip
        for kind in ("dppo_tv", "dppo_kl"):
            yield f"{kind}, {a}", theirs(kind, a, "token_advantages", weighted=True, **clip), {
                **ours, "objective": kind, "ratio_cap": 3.0, **weighted
            }, ""  # fmt: skip
    seq = {"aggregation": "seq-mean-token-mean"}
    yield "gspo", theirs("gspo", seq["aggregation"], "token_advantages", weighted=True, **clip), {
        **ours, "ratio": "sequence-token", "weighted": True, "advantages": "token_advantages", **seq
    }, ""  # fmt: skip
    yield "gspo as ratio='sequence'", theirs("gspo", seq["aggregation"], "token_advantages", **clip), {
        **ours, "ratio": "sequence", "advantages": "token_advantages", **seq
    }, "GSPO's own gradient; verl's is GSPO-token's"  # fmt: skip
    yield "sapo", theirs("sapo", seq["aggregation"], "token_advantages", tau_pos=1.0, tau_neg=1.05), {
        "objective": "sapo", "tau_positive": 1.0, "tau_negative": 1.05, "advantages": "token_advantages", **seq
    }, ""  # fmt: skip
    yield "geo_mean (GMPO)", theirs("geo_mean", seq["aggregation"], **clip), {
        "objective": "gmpo", "clip_low": 0.2, "clip_high": 0.28, **seq
    }, ""  # fmt: skip


def slime(folder: Path) -> Iterator[Case]:
    """``slime/utils/ppo_utils.py``: terms a token, averaged here."""
    peer = from_sources(
        {folder / "slime/utils/ppo_utils.py": ("compute_policy_loss", "compute_cispo_loss", "compute_approx_kl")}
    )

    def ppo(x: dict[str, torch.Tensor]) -> torch.Tensor:
        terms, _ = peer.compute_policy_loss(x["old_logprobs"] - x["logprobs"], x["advantages"], 0.2, 0.28, 3.0)
        return mean(terms, x["mask"])

    def cispo(x: dict[str, torch.Tensor]) -> torch.Tensor:
        kl = x["old_logprobs"] - x["logprobs"]
        return mean(peer.compute_cispo_loss(kl, x["logprobs"], x["advantages"], 0.2, 0.28)[0], x["mask"])

    def corrected(x: dict[str, torch.Tensor]) -> torch.Tensor:
        ratio = (x["logprobs"] - x["old_logprobs"]).exp()
        kl = peer.compute_approx_kl(x["logprobs"], x["ref_logprobs"], "k3", ratio)
        return ppo(x) + 0.1 * mean(kl, x["mask"])

    ours = {"clip_low": 0.2, "clip_high": 0.28}
    yield "PPO, dual clip", ppo, {**ours, "dual_clip": 3.0}, ""
    yield "CISPO", cispo, {**ours, "objective": "cispo"}, ""
    yield "PPO, k3 times the ratio", corrected, {
        **ours, "dual_clip": 3.0, "kl_coef": 0.1, "kl_correction": True, "reference": "ref_logprobs"
    }, ""  # fmt: skip


def prime_rl(folder: Path) -> Iterator[Case]:
    """``prime_rl/trainer/rl/loss.py``: sums over tokens."""
    names = ("_safe_mean", "compute_importance_ratio_and_mismatch_kl", "default_loss_fn")
    peer = from_sources({folder / "src/prime_rl/trainer/rl/loss.py": names}, LossOutputs=SimpleNamespace)
    settings = SimpleNamespace(dppo_mask_low=0.1, dppo_mask_high=0.15, adv_tau=1.0, kl_tau=0.05)

    def default(x: dict[str, torch.Tensor]) -> torch.Tensor:
        given = SimpleNamespace(
            trainer_logprobs=x["logprobs"], inference_logprobs=x["old_logprobs"], advantages=x["token_advantages"],
            loss_mask=x["mask"], loss_weights=None,
        )  # fmt: skip
        return peer.default_loss_fn(given, settings).loss

    yield "default (DPPO-TV, k2)", default, {
        "objective": "dppo_tv", "clip_low": 0.1, "clip_high": 0.15, "advantages": "token_advantages",
        "denominator": 1.0, "kl_coef": 0.1, "kl_estimator": "k2", "reference": "old_logprobs",
    }, "value: their term is A r, ours A sg(r) log pi; gradients agree"  # fmt: skip


def nemo_rl(folder: Path) -> Iterator[Case]:
    """``nemo_rl``'s ``ClippedPGLossFn``."""
    base = folder / "nemo_rl/algorithms"
    sources = {
        base / "utils.py": ("calculate_kl", "masked_mean"),
        base / "loss/interfaces.py": ("LossType", "LossInputType", "MetricNormalizer"),
        base / "loss/loss_functions.py": ("ClippedPGLossFn",),
    }
    peer = from_sources(
        sources, enum=enum, LossFunction=object, Optional=Optional, Tensor=TypeVar("Tensor"), math=math
    )  # fmt: skip
    plain = {
        "disable_ppo_ratio": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "ratio_clip_c": 3.0,
        "use_kl_in_reward": False, "reference_policy_kl_penalty": 0.0, "reference_policy_kl_type": "k3",
        "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0, "use_importance_sampling_correction": False,
        "truncated_importance_sampling_type": None, "truncated_importance_sampling_ratio": None,
        "truncated_importance_sampling_ratio_min": None, "use_on_policy_kl_approximation": False,
        "force_on_policy_ratio": False, "sequence_level_importance_ratios": False, "positive_example_nll_weight": 0.0,
        "token_level_loss": True, "use_cispo": False,
    }  # fmt: skip

    def theirs(**changes: Any) -> Loss:
        function = peer.ClippedPGLossFn(SimpleNamespace(**(plain | changes)))

        def loss(x: dict[str, torch.Tensor]) -> torch.Tensor:
            def shifted(tensor: torch.Tensor) -> torch.Tensor:
                return torch.cat([torch.zeros_like(tensor[:, :1]), tensor], 1)

            data = {
                "token_mask": shifted(x["mask"].float()), "sample_mask": torch.ones(SEQUENCES),
                "advantages": shifted(x["advantages"]), "prev_logprobs": shifted(x["old_logprobs"]),
                "generation_logprobs": shifted(x["old_logprobs"]),
                "reference_policy_logprobs": shifted(x["ref_logprobs"]),
            }  # fmt: skip
            counts = torch.tensor(float(SEQUENCES)), x["mask"].sum().float()
            return function(x["logprobs"], data, *counts)[0]

        return loss

    ours = {"clip_low": 0.2, "clip_high": 0.28}
    by_sequence = {"token_level_loss": False}
    yield "PPO, dual clip, token", theirs(), {**ours, "dual_clip": 3.0}, ""
    yield "PPO, dual clip, sequence", theirs(**by_sequence), {
        **ours, "dual_clip": 3.0, "aggregation": "seq-mean-token-mean"
    }, ""  # fmt: skip
    yield "GSPO", theirs(**by_sequence, sequence_level_importance_ratios=True, ratio_clip_c=None), {
        **ours, "ratio": "sequence", "aggregation": "seq-mean-token-mean"
    }, ""  # fmt: skip
    yield "CISPO", theirs(use_cispo=True, ratio_clip_c=None), {**ours, "objective": "cispo"}, ""
    yield "PPO, k3", theirs(reference_policy_kl_penalty=0.1), {
        **ours, "dual_clip": 3.0, "kl_coef": 0.1, "reference": "ref_logprobs"
    }, "gradient: theirs has the score-function term of the KL, too; values agree"  # fmt: skip


def compare(theirs: Loss, options: dict[str, Any], backend: Any) -> tuple[float, float]:
    """Relative differences of loss and gradient."""
    options = dict(options)
    x = inputs()
    advantages, reference = x[options.pop("advantages", "advantages")], options.pop("reference", None)
    weights = x["importance_weights"] if options.pop("weighted", False) else None
    found = []
    for ours in (True, False):
        leaf = x["logprobs"].clone().requires_grad_()
        if ours:
            loss, _ = ctrl_kernels.policy_loss(
                leaf, x["old_logprobs"], advantages, x["mask"], importance_weights=weights, backend=backend,
                ref_logprobs=None if reference is None else x[reference], **options,
            )  # fmt: skip
        else:
            loss = theirs(x | {"logprobs": leaf})
        found += [loss.detach(), torch.autograd.grad(loss, leaf)[0]]
    return tuple(((a - b).norm() / b.norm()).item() for a, b in (found[0::2], found[1::2]))  # type: ignore[return-value]


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("slime", "prime-rl", "nemo-rl"):
        parser.add_argument(f"--{name}", type=Path, help="a checkout of its sources")
    parser.add_argument("--backend", choices=("triton", "torch"), default="torch", help="ours; default: torch")
    given = parser.parse_args()
    peers: dict[str, Callable[[], Iterator[Case]]] = {"verl": verl}
    for name, cases in {"slime": slime, "prime_rl": prime_rl, "nemo_rl": nemo_rl}.items():
        folder = getattr(given, name)
        if folder is not None:
            peers[name] = lambda cases=cases, folder=folder: cases(folder)
    print("| loss | value | gradient | |\n|---|---|---|---|")
    wrong = 0
    for peer, cases in peers.items():
        try:
            for name, theirs, options, reason in cases():
                value, gradient = compare(theirs, options, given.backend)
                wrong += not reason and not (value < AGREEMENT and gradient < AGREEMENT)
                print(f"| {peer} {name} | {value:.1e} | {gradient:.1e} | {reason} |", flush=True)
        except ImportError as missing:
            print(f"{peer}: left out, {missing}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
