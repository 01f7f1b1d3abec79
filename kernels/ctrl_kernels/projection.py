"""The vocabulary projection in pieces: logits of a chunk of tokens and a segment of the vocabulary at a time.

Logits exist only as ``n x segment`` in fp32, which one pass of ``ctrl_kernels.softmax_statistics`` reduces: the
product is cuBLAS's, at its full speed, and the logits are never rounded. Gradients accumulate in fp32.

Legend: n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, S segments, K tiles of the
shard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from ctrl_kernels.matmul import accumulate, multiply
from ctrl_kernels.shard import SoftmaxOptions
from ctrl_kernels.softmax_statistics import segment_columns, segment_count, softmax_statistics, tile_shape

CHUNK_MULTIPLE = 128  # tokens of a chunk: whole tiles of a matrix product
TILE_COLUMNS = 256
PROCESSORS = 132  # of an H100 or H200; chunks are cut alike on other machines
WORKSPACE_MB = 480


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The rows [V, D] of the output layer that belong to this rank, cut into segments."""

    weight: torch.Tensor
    options: SoftmaxOptions
    workspace_mb: int

    @property
    def segment(self) -> int:
        """Columns of a segment."""
        return segment_columns(len(self.weight), self.options.ranks)

    @property
    def segment_tiles(self) -> int:
        """Tiles of a segment."""
        return triton.cdiv(self.segment, tile_shape(self.segment)[1])

    @property
    def segment_count(self) -> int:
        """Segments of the shard, empty ones included."""
        return segment_count(self.options.ranks)

    def segments(self) -> Iterator[tuple[int, slice]]:
        """Index and valid columns of every segment that has any."""
        for index in range(self.segment_count):
            begin = index * self.segment
            if begin < self.options.valid:
                yield index, slice(begin, min(begin + self.segment, self.options.valid))

    def chunks(self, tokens: int, bytes_per_token: int, *, whole_waves: bool = False) -> list[slice]:
        """Even chunks of tokens, as few as the workspace allows.

        With ``whole_waves``, for chunks whose gradient [n, D] is one product over all of V: sized so that the tiles of
        these products fill the processors in few waves, all chunks together, where a further chunk, which reads and
        writes the weight's gradient once more, counts as half a wave.
        """
        if tokens == 0:
            return []
        most = max(1, (self.workspace_mb << 20) // bytes_per_token // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        step = triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, most)), CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        if whole_waves and step < tokens:
            sizes = range(CHUNK_MULTIPLE, step + 1, CHUNK_MULTIPLE)
            step = min(sizes, key=lambda n: 2 * _waves(tokens, n, self.weight.shape[1]) + triton.cdiv(tokens, n))
        return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]

    def workspace(self, chunks: list[slice], columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the longest chunk's ``n x columns``."""
        tokens = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        return self.weight.new_empty(tokens * columns, dtype=dtype)

    def logits(self, hidden_nD: torch.Tensor, columns: slice, workspace: torch.Tensor) -> torch.Tensor:
        """The logits [n, columns] in the workspace's type and memory."""
        logits_nV = matrix(workspace, len(hidden_nD), columns.stop - columns.start)
        multiply(hidden_nD, self.weight[columns].T, logits_nV)
        return logits_nV

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
                weights_NV=None if weights_nV is None else weights_nV[:, columns],
                tile_max_NK=None if tile_max_nK is None else tile_max_nK[:, index * self.segment_tiles :],
            )


def _waves(tokens: int, step: int, width: int) -> int:
    """Waves of tiles that the products [n, D] take for all chunks of ``step`` tokens."""
    whole, rest = divmod(tokens, step)
    across = triton.cdiv(width, TILE_COLUMNS)
    waves = [triton.cdiv(triton.cdiv(n, CHUNK_MULTIPLE) * across, PROCESSORS) for n in (step, rest)]
    return whole * waves[0] + waves[1]


def matrix(workspace: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The first ``rows x columns`` elements of a workspace as a dense matrix."""
    return workspace[: rows * columns].view(rows, columns)


def propagate(
    d_logits_nV: torch.Tensor,
    hidden_nD: torch.Tensor,
    weight_VD: torch.Tensor,
    d_hidden_nD: torch.Tensor | None,
    d_weight_VD: torch.Tensor | None,
    *,
    first_hidden: bool,
    first_weight: bool,
) -> None:
    """Add the gradients of a chunk's hidden states and of a segment's weights to fp32 accumulators.

    The first product into an accumulator overwrites it, which spares clearing and reading it.
    """
    for total, a, b, first in (
        (d_hidden_nD, d_logits_nV, weight_VD, first_hidden),
        (d_weight_VD, d_logits_nV.T, hidden_nD, first_weight),
    ):
        if total is None:
            continue
        if first:
            multiply(a, b, total)
        else:
            accumulate(total, a, b)
