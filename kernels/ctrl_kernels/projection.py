"""The vocabulary projection in pieces: logits of a chunk of tokens and a segment of the vocabulary at a time.

Logits exist only as ``n x segment`` in fp32, which one pass of ``ctrl_kernels.softmax_statistics`` reduces: the
product is cuBLAS's, at its full speed, and the logits are never rounded. Gradients accumulate in fp32, and are rounded
once, by the product itself where that is the only one.

Legend: n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, S segments, K tiles of the
shard.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from ctrl_kernels.options import Shard, ceil_div
from ctrl_kernels.softmax_statistics import segment_columns, segment_count, softmax_statistics, tile_shape

_CHUNK_MULTIPLE = 128  # tokens of a chunk: whole tiles of a matrix product
_TILE_COLUMNS = 256
PROCESSORS = 132  # of an H100 or H200, where there is no GPU to ask
WORKSPACE_MB = 2048  # where a fortieth of the card's memory allows it
_LOGITS_PART = 4  # of the workspace, what is left to fp32 logits beside what stays of a chunk, at least
SCALE_BLOCK = 4096
_SCALE_PROGRAMS = 528  # a few a processor: idle ones end at once
Rows: TypeAlias = torch.Tensor | None  # distinct increasing indices of tokens; None: all of them


@lru_cache(maxsize=32)
def _card(device: torch.device) -> tuple[int, int]:
    """A device's processors and MiB of memory."""
    if device.type != "cuda":
        return PROCESSORS, 40 * WORKSPACE_MB
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.total_memory >> 20


def _default_workspace_mb(device: torch.device) -> int:
    """What the linear functions may take unless told otherwise: a fortieth of the card, 2 GiB at most."""
    if torch.compiler.is_compiling():
        return 0  # asked by the operator: what a card has is no business of a trace
    return max(64, min(WORKSPACE_MB, _card(device)[1] // 40))


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless ``hidden`` [N, D], ``weight`` [V, D] and ``bias`` [V] fit together.

    Beside hidden states in half precision the weight may be fp32, as a master weight under AMP is.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    mixed = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
    if (hidden.dtype != weight.dtype and not mixed) or hidden.device != weight.device:
        raise ValueError(
            f"hidden and weight must share dtype and device, got {hidden.dtype} on {hidden.device} "
            f"and {weight.dtype} on {weight.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(f"bias must have shape ({len(weight)},) on {weight.device}, got {tuple(bias.shape)}")


def check_main_grad(main_grad: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raise ValueError unless ``main_grad`` is None or a dense fp32 tensor shaped like ``weight``."""
    if main_grad is None:
        return
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad must be dense float32 of shape {tuple(weight.shape)}, "
            f"got {main_grad.dtype} of shape {tuple(main_grad.shape)}"
        )


def check_workspace(workspace_mb: int | None, device: torch.device) -> int:
    """What the linear functions may take, by the card unless given; ValueError for less than a MiB."""
    if workspace_mb is None:
        return _default_workspace_mb(device)
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb={workspace_mb} must be at least 1")
    return workspace_mb


def chosen_rows(wanted_N: torch.Tensor, host_sync: bool) -> Rows:
    """The tokens that are wanted, or all where that is what they are or where the host may not wait to know."""
    if not host_sync:
        return None
    rows = wanted_N.nonzero().squeeze(1)
    return None if len(rows) == len(wanted_N) else rows


def count(rows: Rows, x: torch.Tensor) -> int:
    """How many rows of ``x`` are chosen."""
    return len(x) if rows is None else len(rows)


def take(x: torch.Tensor, rows: Rows, chunk: slice = slice(None)) -> torch.Tensor:
    """A chunk of the chosen rows of ``x``; a view of it if all are."""
    return x[chunk] if rows is None else x.index_select(0, rows[chunk])


def spread(x: torch.Tensor, rows: Rows, length: int, fill: float = 0.0) -> torch.Tensor:
    """``x`` at the chosen rows of a tensor of this length that is ``fill`` elsewhere."""
    return x if rows is None else x.new_full((length, *x.shape[1:]), fill).index_copy_(0, rows, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The rows [V, D] of the output layer that belong to this rank, cut into segments."""

    weight: torch.Tensor
    options: Shard
    workspace_mb: int  # 0: by the card
    bias: torch.Tensor | None = None

    @property
    def segment(self) -> int:
        """Columns of a segment."""
        return segment_columns(len(self.weight), self.options.ranks)

    @property
    def segment_tiles(self) -> int:
        """Tiles of a segment."""
        return ceil_div(self.segment, tile_shape(self.segment)[1])

    @property
    def segment_count(self) -> int:
        """Segments of the shard, empty ones included."""
        return segment_count(self.options.ranks)

    def segments(self, together: int = 1) -> Iterator[tuple[int, slice]]:
        """Index and valid columns of every segment that has any, or of so many neighbours at a time."""
        for index in range(0, self.segment_count, together):
            begin = index * self.segment
            if begin < self.options.valid:
                yield index, slice(begin, min(begin + together * self.segment, self.options.valid))

    def together(self, tokens: int) -> int:
        """How many neighbouring segments' gradient [n, columns] the workspace holds for all tokens at once.

        Fewer and larger products fill more of their last waves, and add up the gradient of hidden states less often.
        """
        fitting = (
            n
            for n in range(self.segment_count, 1, -1)
            if self.segment_count % n == 0 and len(self.chunks(tokens, self.gradient_bytes(n), whole_waves=True)) <= 1
        )
        return next(fitting, 1)

    def columns(self, together: int) -> int:
        """Of so many segments, at most."""
        return min(together * self.segment, self.options.valid)

    def gradient_bytes(self, together: int) -> int:
        """Of a token's part in the gradient of so many segments, and of its hidden states."""
        return self.weight.element_size() * (self.columns(together) + self.weight.shape[1])

    def chunks(self, tokens: int, bytes_per_token: int, *, whole_waves: bool = False) -> list[slice]:
        """Even chunks of tokens, as few as the workspace allows.

        With ``whole_waves``, for chunks that end in products [n, D] and [V, D]: sized so that the tiles of the former
        fill the processors in few waves, all chunks together, where a further chunk, which reads and writes the
        latter once more, counts as half a wave. These leave room for ``parts``.
        """
        if tokens == 0:
            return []
        space = self._workspace_bytes
        if whole_waves:
            space -= space // _LOGITS_PART
        most = max(1, space // bytes_per_token // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
        step = _even(tokens, most)
        if whole_waves and step < tokens:
            # Up to the largest chunk that fits: uneven ones may fill whole waves where even ones do not.
            sizes = range(_CHUNK_MULTIPLE, min(most, tokens) + 1, _CHUNK_MULTIPLE)
            step = min(sizes, key=lambda n: (2 * self._waves(tokens, n) + ceil_div(tokens, n), -n))
        return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]

    def parts(self, chunk: slice, bytes_per_token: int, together: int = 1) -> list[slice]:
        """A chunk, of which each token takes so much, in even parts whose fp32 logits of segments fit beside it."""
        tokens, space = chunk.stop - chunk.start, self._workspace_bytes
        left = max(space - bytes_per_token * tokens, space // _LOGITS_PART)
        most = max(1, left // (4 * max(1, self.columns(together))) // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
        step = _even(tokens, most)
        return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]

    @property
    def _workspace_bytes(self) -> int:
        return (self.workspace_mb or _default_workspace_mb(self.weight.device)) << 20

    def _waves(self, tokens: int, step: int) -> int:
        """Waves of tiles that the products [n, D] take for all chunks of ``step`` tokens."""
        processors, _ = _card(self.weight.device)
        whole, rest = divmod(tokens, step)
        across = ceil_div(self.weight.shape[1], _TILE_COLUMNS)
        waves = [ceil_div(ceil_div(n, _CHUNK_MULTIPLE) * across, processors) for n in (step, rest)]
        return whole * waves[0] + waves[1]

    def workspace(self, chunks: list[slice], columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the longest chunk's ``n x columns``."""
        tokens = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        return self.weight.new_empty(tokens * columns, dtype=dtype)

    def saved(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the softmax weights [tokens, V] and the tile maxima [tokens, K] that a backward pass needs."""
        tiles = self.segment_count * self.segment_tiles
        weights = self.weight.new_empty((tokens, self.options.valid), dtype=dtype)
        return weights, self.weight.new_empty((tokens, tiles), dtype=torch.float32)

    def logits(self, hidden_nD: torch.Tensor, columns: slice, workspace: torch.Tensor) -> torch.Tensor:
        """The logits [n, columns] in the workspace's type and memory."""
        logits_nV = matrix(workspace, len(hidden_nD), columns.stop - columns.start)
        multiply(hidden_nD, self.weight[columns].T, logits_nV)
        return logits_nV

    def bias_of(self, columns: slice) -> torch.Tensor | None:
        """The bias of these columns."""
        return None if self.bias is None else self.bias[columns]

    def statistics(
        self,
        hidden_nD: torch.Tensor,
        targets_n: torch.Tensor,
        statistics_Sn4: torch.Tensor,
        workspace: torch.Tensor,
        weights_nV: torch.Tensor | None = None,
        tile_max_nK: torch.Tensor | None = None,
    ) -> None:
        """Fill the statistics of a chunk, and its softmax weights and tile maxima where asked for."""
        for index in range(self.segment_count):
            if index * self.segment >= self.options.valid:
                statistics_Sn4[index] = statistics_Sn4.new_tensor([-math.inf, 0.0, 0.0, math.nan])
        for index, columns in self.segments():
            softmax_statistics(
                self.logits(hidden_nD, columns, workspace),
                targets_n,
                statistics_Sn4[index : index + 1],
                self.options,
                segment=self.segment,
                first_column=columns.start,
                bias_V=self.bias_of(columns),
                weights_NV=None if weights_nV is None else weights_nV[:, columns],
                tile_max_NK=None if tile_max_nK is None else tile_max_nK[:, index * self.segment_tiles :],
            )


def _even(tokens: int, most: int) -> int:
    """The size of the fewest even chunks of at most so many tokens, rounded up to whole tiles."""
    return ceil_div(ceil_div(tokens, ceil_div(tokens, most)), _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE


def matrix(workspace: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The first ``rows x columns`` elements of a workspace as a dense matrix."""
    return workspace[: rows * columns].view(rows, columns)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a @ b``, rounded once, to the type of ``out``: that of the factors or float32.

    The product is cuBLAS's, as PyTorch calls it. Factors stay as they are where PyTorch can widen within a product (on
    CUDA, from 2.8 on); elsewhere they are widened first.
    """
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _widens("mm", a.is_cuda):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        with _exact_tf32(a):
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` in the type of ``total``: that of the factors or float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _widens("addmm", a.is_cuda):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        with _exact_tf32(a):
            total.addmm_(a.to(total.dtype), b.to(total.dtype))


@lru_cache(maxsize=4)
def _widens(product: str, is_cuda: bool) -> bool:
    """Whether this product takes half-precision factors to an fp32 result: PyTorch's, on CUDA."""
    return is_cuda and any("out_dtype" in str(s) for s in torch._C._jit_get_schemas_for_operator(f"aten::{product}"))


@contextmanager
def _exact_tf32(a: torch.Tensor) -> Iterator[None]:
    """Let fp32 products on CUDA use TF32, which holds bf16 and fp16 exactly; for factors widened from these."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or (a.is_cuda and a.dtype in (torch.bfloat16, torch.float16))
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def propagate(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """``total += a @ b``; the first product into it overwrites what it holds, which spares clearing and reading it."""
    if total is None:
        return
    if first:
        multiply(a, b, total)
    else:
        accumulate(total, a, b)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            index = begin + tl.arange(0, BLOCK)  # 64 bits: a step past the end may pass 2^31
            x = tl.load(x_ptr + index, mask=index < count, other=0.0)
            tl.store(x_ptr + index, (x * factor).to(x_ptr.dtype.element_ty), mask=index < count)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``x *= factor`` for a dense ``x`` and a scalar tensor, without a wait for the device; idle if the factor is 1."""
    if type(x) is not torch.Tensor:  # fake: nothing to launch for
        return x.mul_(factor)
    if x.numel():
        programs = min(ceil_div(x.numel(), SCALE_BLOCK), _SCALE_PROGRAMS)
        scale_kernel[(programs,)](x, factor.float(), x.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
    return x
