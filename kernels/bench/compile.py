"""Compile every shipped configuration of every kernel for NVIDIA and AMD targets, without a GPU, and list its needs.

    python kernels/bench/compile.py [--target sm_90 ...] [--peers] [--json FILE]

The table lists registers a thread, stack bytes, spilled bytes (NVIDIA) or spilled registers (AMD), shared memory of a
program and, on NVIDIA, machine instructions an element, of its longest loop or of all of a kernel without one, and the
widest load and store in bits. Exit code 1 if a configuration of ours spills on a Hopper or Blackwell GPU (sm_90,
sm_100), 2 for wrong arguments. The kernels must not be interpreted here: leave TRITON_INTERPRET unset.

``sass.json`` is this table for sm_90 and sm_100 with peers, by triton 3.9: what ours may not exceed, and what
``roofline.py`` reckons with.
"""

import argparse
import importlib
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
from compile_peers import peer_configurations
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctrl_kernels import advantages, policy_kernel, projection, softmax_gradient, softmax_statistics, token_tiles

policy_loss = importlib.import_module("ctrl_kernels.policy_loss")  # as attributes the names are the functions
value_loss = importlib.import_module("ctrl_kernels.value_loss")

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

    Pointers and integers are taken as multiples of 16, except the integers in ``odd``. A program takes so many
    ``elements`` at a time; 0: not counted.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    elements: int = 0
    odd: frozenset[str] = field(default_factory=frozenset)
    stages: int | None = None  # of a pipelined loop; None: the compiler's default

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
    instructions: float | None = None
    load_bits: int | None = None
    store_bits: int | None = None


def statistics() -> Iterator[Configuration]:
    """``softmax_statistics`` of logits as they come, and of fp32 products with and without weights to store."""
    for logits, weights, extra, segment in (
        (BF16, None, "", SEGMENT),
        (FP16, None, "", SEGMENT),
        (FP32, None, "", SEGMENT),
        (BF16, None, "", 80),
        (FP32, BF16, "", SEGMENT),
        (FP32, FP32, "", SEGMENT),
        (FP32, BF16, " softcap", SEGMENT),
        (FP32, BF16, " bias", SEGMENT),
    ):
        rows, columns = softmax_statistics.tile_shape(segment)
        constants = {"HAS_SOFTCAP": extra == " softcap", "STORE_WEIGHTS": weights is not None, "BLOCK_N": rows}
        yield Configuration(
            name=f"statistics {logits}{f' weights {weights}' if weights else ''}{extra} tile {rows}x{columns}",
            kernel=softmax_statistics.statistics_kernel,
            types={
                "logits_ptr": logits,
                "bias_ptr": FP32,
                "targets_ptr": I64,
                "statistics_ptr": FP32,
                "weights_ptr": weights or logits,
                "tile_max_ptr": FP32,
                "inverse_temperature": "fp32",
                "softcap": "fp32",
            },
            constants=constants | softmax_statistics.lanes(columns) | ({} if extra == " bias" else {"bias_ptr": None}),
            warps=softmax_statistics.STATISTICS_WARPS,
            elements=rows * columns if segment == SEGMENT else 0,
            odd=frozenset({"segments", "tile_max_stride", "ignore_index"}),
        )
    yield Configuration(
        name="combine",
        kernel=softmax_statistics.combine_kernel,
        types=dict.fromkeys(("statistics_ptr", "logprob_ptr", "entropy_ptr", "lse_ptr"), FP32) | {"targets_ptr": I64},
        constants={"BLOCK_N": softmax_statistics.COMBINE_ROWS},
        warps=4,
        odd=frozenset({"parts", "ignore_index"}),
    )


def gradients() -> Iterator[Configuration]:
    """``logits_gradient`` and ``weights_gradient``."""
    rows, columns = softmax_statistics.tile_shape(SEGMENT)
    vectors = ("lse_ptr", "entropy_ptr", "logprob_ptr", "d_logprob_ptr", "d_entropy_ptr", "tile_max_ptr", "bias_ptr")
    scalars = ("inverse_temperature", "softcap", "temperature_over_softcap")
    types = dict.fromkeys(vectors, FP32) | dict.fromkeys(scalars, "fp32") | {"targets_ptr": I64}
    common = {"BLOCK_N": rows, "BLOCK_V": columns}
    for logits, out, extra in (
        (BF16, BF16, ""),
        (BF16, BF16, " entropy"),
        (FP16, FP16, " entropy"),
        (FP32, FP32, " entropy"),
        (FP32, BF16, ""),
        (FP32, BF16, " entropy"),
        (FP32, BF16, " entropy softcap"),
        (FP32, BF16, " entropy bias"),
    ):
        flags = {"HAS_LOGPROB": True, "HAS_ENTROPY": "entropy" in extra, "HAS_SOFTCAP": "softcap" in extra}
        yield Configuration(
            name=f"logits gradient {logits} to {out}{extra}",
            kernel=softmax_gradient.logits_gradient_kernel,
            types=types | {"logits_ptr": logits, "out_ptr": out},
            constants=common | flags | ({} if "bias" in extra else {"bias_ptr": None}),
            warps=softmax_gradient.GRADIENT_WARPS,
            elements=rows * columns,
            odd=frozenset({"d_logprob_stride", "d_entropy_stride", "ignore_index"}),
        )
    for weights, extra in ((BF16, ""), (BF16, " entropy"), (FP32, " entropy"), (BF16, " entropy softcap")):
        yield Configuration(
            name=f"weights gradient {weights}{extra}",
            kernel=softmax_gradient.weights_gradient_kernel,
            types=types | {"weights_ptr": weights, "out_ptr": weights},
            constants=common | {"HAS_ENTROPY": "entropy" in extra, "HAS_SOFTCAP": "softcap" in extra},
            warps=softmax_gradient.GRADIENT_WARPS,
            elements=rows * columns,
            odd=frozenset({"tiles", "tile_max_stride"}),
        )


def losses() -> Iterator[Configuration]:
    """The policy loss in its main forms, and what finishes it."""
    optional = ("ref", "importance", "drift", "entropy", "weights", "denominator", "d_logprobs", "d_entropy")
    types = {f"{name}_ptr": FP32 for name in (*optional, "logprobs", "old", "advantages", "sums")}
    types |= {"mask_ptr": U8, "denominator_ptr": I64}
    types |= dict.fromkeys(("constant", "low", "high", "extra_0", "extra_1", "kl_coef", "entropy_coef"), "fp32")
    tile = token_tiles.LANES * token_tiles.VECTOR
    plain = {
        "OBJECTIVE": "clip",
        "RATIO": "token",
        "HAS_DUAL": False,
        "BY_LENGTH": False,
        "KL": "k3",
        "KL_CORRECTION": False,
    }
    plain |= {"SUMS": policy_kernel.SUMS, "LANES": token_tiles.LANES, "VECTOR": token_tiles.VECTOR, "EVEN": True}
    everything = ("ref", "importance", "entropy", "denominator", "d_logprobs", "d_entropy")
    for name, given, changed in (
        ("token", ("d_logprobs",), {}),
        ("benchmark", ("ref", "d_logprobs"), {"HAS_DUAL": True}),
        ("token all options", everything, {"HAS_DUAL": True}),
        ("sequence mean all options", everything, {"HAS_DUAL": True, "BY_LENGTH": True}),
        ("sequence ratio all options", everything, {"HAS_DUAL": True, "BY_LENGTH": True, "RATIO": "sequence"}),
        ("one pass", (*everything, "weights"), {"HAS_DUAL": True}),
        ("corrected KL", ("ref", "d_logprobs"), {"KL_CORRECTION": True}),
        ("KL-Cov", ("drift", "d_logprobs"), {}),
        *((kind, ("d_logprobs",), {"OBJECTIVE": kind}) for kind in ("cispo", "dppo_tv", "dppo_kl", "sapo", "gmpo")),
    ):
        yield Configuration(
            name=f"policy {name}",
            kernel=policy_kernel.policy_kernel,
            types=types,
            constants=plain | changed | {f"{x}_ptr": None for x in optional if x not in given},
            warps=policy_loss.POLICY_WARPS,
            elements=tile,
        )
    yield Configuration(
        name="policy finish",
        kernel=policy_kernel.finish_kernel,
        types=dict.fromkeys(("sums_ptr", "loss_ptr", "metrics_ptr"), FP32)
        | {"kl_coef": "fp32", "entropy_coef": "fp32"},
        constants={"SUMS": policy_kernel.SUMS, "METRICS": 8, "USED": 10, "BLOCK": policy_loss.FINISH_ROWS},
        warps=8,
        odd=frozenset({"rows"}),
    )


def other_losses() -> Iterator[Configuration]:
    """The value loss, and the scaling of gradients."""
    tile = token_tiles.LANES * token_tiles.VECTOR
    shape = {"LANES": token_tiles.LANES, "VECTOR": token_tiles.VECTOR, "EVEN": True}
    yield Configuration(
        name="value",
        kernel=value_loss.value_kernel,
        types=dict.fromkeys(("values_ptr", "old_ptr", "returns_ptr", "d_values_ptr", "sums_ptr"), FP32)
        | {"mask_ptr": U8, "denominator_ptr": I64, "constant": "fp32", "clip": "fp32"},
        constants=shape | {"BY_LENGTH": False},
        warps=value_loss.VALUE_WARPS,
        elements=tile,
    )
    for dtype in (BF16, FP32):
        yield Configuration(
            name=f"scale {dtype}",
            kernel=projection.scale_kernel,
            types={"x_ptr": dtype, "factor_ptr": FP32},
            constants={"BLOCK": projection.SCALE_BLOCK},
            warps=8,
        )


def estimators() -> Iterator[Configuration]:
    """``group_advantages`` and ``gae``."""
    for estimator, ordered in (("grpo", False), ("dr_grpo", False), ("rloo", False), ("grpo", True)):
        columns = advantages.SORTED_BLOCK_J if ordered else advantages.BLOCK_J
        constants = {"ESTIMATOR": estimator, "BLOCK_I": advantages.BLOCK_I, "BLOCK_J": columns}
        yield Configuration(
            name=f"group advantages {estimator}{' sorted' if ordered else ''}",
            kernel=advantages.group_advantages_kernel,
            types={"rewards_ptr": FP32, "groups_ptr": I64, "order_ptr": I64, "out_ptr": FP32, "eps": "fp32"},
            constants=constants | ({} if ordered else {"order_ptr": None}),
            warps=advantages.ADVANTAGE_WARPS,
        )
    names = ("rewards_ptr", "values_ptr", "advantages_ptr", "returns_ptr")
    yield Configuration(
        name="gae",
        kernel=advantages.gae_kernel,
        types=dict.fromkeys(names, FP32) | {"mask_ptr": U8, "gamma": "fp32", "gamma_lam": "fp32"},
        constants={"LANES": advantages.BLOCK_T // 4, "EVEN": True},
        warps=advantages.GAE_WARPS,
        elements=advantages.BLOCK_T,
    )


def configurations() -> list[Configuration]:
    """All shipped ones."""
    return [*statistics(), *gradients(), *losses(), *other_losses(), *estimators()]


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


def _instructions(sass: str) -> list[str]:
    """Those of the longest loop, or all of a program without one; what is padding does not count."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", sass)
    at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    loops = []
    for number, (address, text) in enumerate(lines):
        jump = re.match(r"BRA(?:\.\S+)? (?:!?U?P\w+, )?`?\(?(?:0x)?([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < int(address, 16):
            loops.append((at[int(jump.group(1), 16)], number + 1))
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(lines)))
    return [text for _, text in lines[begin:end] if not text.startswith("NOP")]


def _widest(instructions: list[str], kind: str) -> int:
    """Bits of the widest global access of a kind, LDG or STG; 0 for none."""
    found = [i.split()[0] for i in instructions if i.startswith(kind)]
    widths = [int(m.group(1)) if (m := re.search(r"\.(64|128|256)\b", i)) else 32 for i in found]
    return max(widths, default=0)


def resources(configuration: Configuration, target: str) -> Resources:
    """Compile a configuration for a target and read off what it takes."""
    gpu = TARGETS[target]
    options = {"num_warps": configuration.warps} | (
        {"num_stages": configuration.stages} if configuration.stages else {}
    )
    compiled = triton.compile(configuration.source(), target=gpu, options=options)
    facts = {"name": configuration.name, "target": target, "shared_bytes": compiled.metadata.shared}
    if gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        return Resources(
            registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
            stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
            spilled=_number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
            **facts,
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        sass = _run("cuobjdump", "-sass", "--dump-resource-usage", str(cubin))
        stack, spilled = _number(r"STACK:(\d+)", sass), 0
        if stack:  # where spills would be
            architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])
            assert architecture is not None
            verbose = _run("ptxas-blackwell", "-v", f"--gpu-name={architecture.group(1)}", str(ptx), "-o", os.devnull)
            spilled = _number(r"(\d+) bytes spill stores", verbose)
    instructions = _instructions(sass)
    a_thread = configuration.elements / (32 * configuration.warps)
    return Resources(
        registers=_number(r"REG:(\d+)", sass),
        stack_bytes=stack,
        spilled=spilled,
        instructions=round(len(instructions) / a_thread, 1) if a_thread else None,
        load_bits=_widest(instructions, "LDG"),
        store_bits=_widest(instructions, "STG"),
        **facts,
    )


def _cell(row: Resources) -> str:
    text = f"{row.registers} / {row.stack_bytes} / {row.spilled} / {row.shared_bytes}"
    if row.load_bits is None:
        return text
    return f"{text}; {row.instructions or '-'}; {row.load_bits}, {row.store_bits}"


def _print(rows: list[Resources], targets: list[str]) -> None:
    title = "registers / stack / spilled / shared memory of a program; instructions an element; bits of load, store"
    table = Table(title=f"triton {triton.__version__}: {title}")
    table.add_column("configuration")
    for target in targets:
        table.add_column(target, justify="right")
    cells = {(r.name, r.target): _cell(r) for r in rows}
    for name in dict.fromkeys(r.name for r in rows):
        table.add_row(name, *(cells[name, target] for target in targets))
    Console(width=190).print(table)


def main() -> int:
    """Compile, print the table, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--peers", action="store_true", help="also compile the peers' kernels, as far as installed")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    rows, ours = [], configurations()
    listed = [*ours, *(peer_configurations(Configuration) if arguments.peers else ())]
    for number, configuration in enumerate(listed, 1):
        print(f"\r{number}/{len(listed)} {configuration.name:60}", end="", file=sys.stderr, flush=True)
        rows += [resources(configuration, target) for target in arguments.target]
    print(file=sys.stderr)
    _print(rows, arguments.target)
    if arguments.json:
        lines = ",\n".join(f" {json.dumps(asdict(row))}" for row in rows)
        arguments.json.write_text(f"[\n{lines}\n]\n")
    names = {configuration.name for configuration in ours}
    spilling = [row.name for row in rows if row.name in names and row.target in ("sm_90", "sm_100") and row.spilled]
    if spilling:
        print(f"spills: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
