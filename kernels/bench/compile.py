"""Compile every shipped configuration of every kernel for NVIDIA and AMD targets, without a GPU, and list its needs.

    python kernels/bench/compile.py [--target sm_90 ...] [--json FILE]

The table lists registers a thread, stack bytes, spilled bytes (NVIDIA) or spilled registers (AMD), and shared memory
of a program. Exit code 1 if a configuration spills on a Hopper GPU (sm_90), 2 for wrong arguments. The kernels must
not be interpreted here: leave TRITON_INTERPRET unset.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from ctrl_kernels import advantages, generalized_advantage, policy_terms, scaling, softmax_gradient, softmax_statistics
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32, I64, U8 = "*bf16", "*fp16", "*fp32", "*i64", "*u8"
SEGMENT = softmax_statistics.segment_columns(152_064, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A kernel with the types, constants and warps of one of its uses.

    Pointers and integers are taken as multiples of 16, except the integers in ``odd``.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    odd: frozenset[str] = field(default_factory=frozenset)

    def source(self) -> ASTSource:
        """What Triton's compiler takes."""
        names = list(self.kernel.arg_names)
        signature = {n: "constexpr" if n in self.constants else self.types.get(n, "i32") for n in names}
        aligned = [n for n in names if (signature[n] == "i32" and n not in self.odd) or signature[n].startswith("*")]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in self.constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled configuration takes; ``spilled`` counts bytes on NVIDIA GPUs and vector registers on AMD ones."""

    name: str
    target: str
    registers: int
    stack_bytes: int
    spilled: int
    shared_bytes: int


def statistics() -> Iterator[Configuration]:
    """``softmax_statistics`` of logits as they come, and of fp32 products with and without weights to store."""
    for logits, weights, softcap, segment in (
        (BF16, None, False, SEGMENT),
        (FP16, None, False, SEGMENT),
        (FP32, None, False, SEGMENT),
        (BF16, None, False, 80),
        (FP32, BF16, False, SEGMENT),
        (FP32, FP32, False, SEGMENT),
        (FP32, BF16, True, SEGMENT),
    ):
        rows, columns = softmax_statistics.tile_shape(segment)
        suffix = f"{f' weights {weights}' if weights else ''}{' softcap' if softcap else ''}"
        yield Configuration(
            name=f"statistics {logits}{suffix} tile {rows}x{columns}",
            kernel=softmax_statistics._statistics_kernel,
            types={
                "logits_ptr": logits,
                "targets_ptr": I64,
                "statistics_ptr": FP32,
                "weights_ptr": weights or logits,
                "tile_max_ptr": FP32,
                "inverse_temperature": "fp32",
                "softcap": "fp32",
            },
            constants={
                "HAS_SOFTCAP": softcap,
                "STORE_WEIGHTS": weights is not None,
                "BLOCK_N": rows,
            }
            | softmax_statistics.lanes(columns),
            warps=softmax_statistics.STATISTICS_WARPS,
            odd=frozenset({"segments", "tile_max_stride"}),
        )
    yield Configuration(
        name="combine",
        kernel=softmax_statistics._combine_kernel,
        types=dict.fromkeys(("statistics_ptr", "logprob_ptr", "entropy_ptr", "lse_ptr"), FP32) | {"targets_ptr": I64},
        constants={"BLOCK_N": softmax_statistics.COMBINE_ROWS},
        warps=4,
        odd=frozenset({"parts", "ignore_index"}),
    )


def gradients() -> Iterator[Configuration]:
    """``logits_gradient`` and ``weights_gradient``."""
    rows, columns = softmax_statistics.tile_shape(SEGMENT)
    vectors = ("lse_ptr", "entropy_ptr", "logprob_ptr", "d_logprob_ptr", "d_entropy_ptr", "tile_max_ptr")
    scalars = ("inverse_temperature", "softcap", "temperature_over_softcap")
    types = dict.fromkeys(vectors, FP32) | dict.fromkeys(scalars, "fp32") | {"targets_ptr": I64}
    common = {"BLOCK_N": rows, "BLOCK_V": columns}
    for logits, out, entropy, softcap in (
        (BF16, BF16, False, False),
        (BF16, BF16, True, False),
        (FP16, FP16, True, False),
        (FP32, FP32, True, False),
        (FP32, BF16, False, False),
        (FP32, BF16, True, False),
        (FP32, BF16, True, True),
    ):
        yield Configuration(
            name=f"logits gradient {logits} to {out}{' entropy' if entropy else ''}{' softcap' if softcap else ''}",
            kernel=softmax_gradient._logits_gradient_kernel,
            types=types | {"logits_ptr": logits, "out_ptr": out},
            constants=common | {"HAS_LOGPROB": True, "HAS_ENTROPY": entropy, "HAS_SOFTCAP": softcap},
            warps=softmax_gradient.GRADIENT_WARPS,
            odd=frozenset({"d_logprob_stride", "d_entropy_stride", "ignore_index"}),
        )
    for weights, entropy, softcap in (
        (BF16, False, False),
        (BF16, True, False),
        (FP32, True, False),
        (BF16, True, True),
    ):
        yield Configuration(
            name=f"weights gradient {weights}{' entropy' if entropy else ''}{' softcap' if softcap else ''}",
            kernel=softmax_gradient._weights_gradient_kernel,
            types=types | {"weights_ptr": weights, "out_ptr": weights},
            constants=common | {"HAS_ENTROPY": entropy, "HAS_SOFTCAP": softcap},
            warps=softmax_gradient.GRADIENT_WARPS,
            odd=frozenset({"tiles", "tile_max_stride"}),
        )


def losses() -> Iterator[Configuration]:
    """The policy loss in its main forms, and what finishes it."""
    pointers = ("logprobs", "old", "advantages", "ref", "importance", "entropy", "weights", "denominator")
    outputs = ("d_logprobs", "d_entropy", "sums")
    types = {f"{name}_ptr": FP32 for name in (*pointers, *outputs)} | {"mask_ptr": U8}
    types |= dict.fromkeys(("low", "high", "dual_clip", "kl_coef", "entropy_coef"), "fp32")
    flags = (
        "HAS_DUAL",
        "HAS_REF",
        "HAS_IMPORTANCE",
        "HAS_ENTROPY",
        "HAS_WEIGHTS",
        "STORE_GRADIENT",
        "STORE_ENTROPY_GRADIENT",
    )
    shape = {"KL": "k3", "SUMS": policy_terms.SUMS, "BLOCK": policy_terms.BLOCK_T}
    everything = {"HAS_DUAL", "HAS_REF", "HAS_IMPORTANCE", "HAS_ENTROPY", "STORE_GRADIENT", "STORE_ENTROPY_GRADIENT"}
    for name, chosen in (
        ("token", {"STORE_GRADIENT"}),
        ("token all options", everything),
        ("sequence mean all options", everything | {"BY_LENGTH"}),
        ("sequence ratio all options", everything | {"SEQUENCE", "BY_LENGTH"}),
        ("one pass", everything | {"HAS_WEIGHTS"}),
    ):
        yield Configuration(
            name=f"policy {name}",
            kernel=policy_terms._policy_kernel,
            types=types,
            constants=shape | {flag: flag in chosen for flag in (*flags, "SEQUENCE", "BY_LENGTH")},
            warps=policy_terms.POLICY_WARPS,
        )
    yield Configuration(
        name="policy finish",
        kernel=policy_terms._finish_kernel,
        types=dict.fromkeys(("sums_ptr", "loss_ptr", "metrics_ptr"), FP32)
        | {"kl_coef": "fp32", "entropy_coef": "fp32"},
        constants={"SUMS": policy_terms.SUMS, "USED": 10, "BLOCK": policy_terms.FINISH_ROWS},
        warps=8,
        odd=frozenset({"rows"}),
    )
    for dtype in (BF16, FP32):
        yield Configuration(
            name=f"scale {dtype}",
            kernel=scaling._scale_kernel,
            types={"x_ptr": dtype, "factor_ptr": FP32},
            constants={"BLOCK": scaling.SCALE_BLOCK},
            warps=8,
        )


def estimators() -> Iterator[Configuration]:
    """``group_advantages`` and ``gae``."""
    for estimator in ("grpo", "dr_grpo", "rloo"):
        yield Configuration(
            name=f"group advantages {estimator}",
            kernel=advantages._group_advantages_kernel,
            types={"rewards_ptr": FP32, "groups_ptr": I64, "out_ptr": FP32, "eps": "fp32"},
            constants={"ESTIMATOR": estimator, "BLOCK_I": advantages.BLOCK_I, "BLOCK_J": advantages.BLOCK_J},
            warps=advantages.ADVANTAGE_WARPS,
        )
    names = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    yield Configuration(
        name="gae",
        kernel=generalized_advantage._gae_kernel,
        types=dict.fromkeys(names, FP32) | {"mask_ptr": U8, "gamma": "fp32", "gamma_lam": "fp32"},
        constants={"LANES": generalized_advantage.BLOCK_T // 4},
        warps=generalized_advantage.GAE_WARPS,
    )


def configurations() -> list[Configuration]:
    """All shipped ones."""
    return [*statistics(), *gradients(), *losses(), *estimators()]


def _run(tool: str, *arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    finished = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)} failed: {finished.stderr.strip()}")
    return finished.stdout + finished.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in:\n{text[-2000:]}"
    return int(found.group(1))


def resources(configuration: Configuration, target: str) -> Resources:
    """Compile a configuration for a target and read off what it takes."""
    gpu = TARGETS[target]
    compiled = triton.compile(configuration.source(), target=gpu, options={"num_warps": configuration.warps})
    if gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
            cubin.write_bytes(compiled.asm["cubin"])
            ptx.write_text(compiled.asm["ptx"])
            usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
            architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])
            assert architecture is not None
            verbose = _run("ptxas-blackwell", "-v", f"--gpu-name={architecture.group(1)}", str(ptx), "-o", os.devnull)
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        spilled = _number(r"(\d+) bytes spill stores", verbose)
    return Resources(
        name=configuration.name,
        target=target,
        registers=registers,
        stack_bytes=stack,
        spilled=spilled,
        shared_bytes=compiled.metadata.shared,
    )


def _print(rows: list[Resources], targets: list[str]) -> None:
    table = Table(title=f"triton {triton.__version__}: registers / stack / spilled / shared memory of a program")
    table.add_column("configuration")
    for target in targets:
        table.add_column(target, justify="right")
    cells = {(r.name, r.target): f"{r.registers} / {r.stack_bytes} / {r.spilled} / {r.shared_bytes}" for r in rows}
    for name in dict.fromkeys(r.name for r in rows):
        table.add_row(name, *(cells[name, target] for target in targets))
    Console(width=150).print(table)


def main() -> int:
    """Compile, print the table, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    rows = []
    for number, configuration in enumerate(configurations(), 1):
        print(f"\r{number}/{len(configurations())} {configuration.name:60}", end="", file=sys.stderr, flush=True)
        rows += [resources(configuration, target) for target in arguments.target]
    print(file=sys.stderr)
    _print(rows, arguments.target)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    spilling = [row.name for row in rows if row.target == "sm_90" and row.spilled]
    if spilling:
        print(f"spills on sm_90: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
