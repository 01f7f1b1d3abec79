"""Time, memory and limits of the machine: CUDA events and graphs on a GPU, the wall clock on a CPU.

A measurement repeats a call for a fraction of a second, after a first call that compiles, and takes the median.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SECONDS = 0.25
MOST_REPEATS = 50
GRAPH_CALLS = 20
MIB = 1 << 20
FLUSH_MIB = 256  # five times the L2 cache of an H200
WARM_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of a forward pass, and of forward and backward together; how much memory the latter adds at most."""

    forward_ms: float
    total_ms: float
    peak_mb: float

    @property
    def backward_ms(self) -> float:
        """The rest."""
        return max(self.total_ms - self.forward_ms, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the machine can do at best: bytes read and written by a large copy, operations of a large product."""

    copy_tb_per_s: float
    matmul_tflop_per_s: float


class Clock:
    """Measures calls on a device; with ``quick`` each only once."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device, self.quick = device, quick
        self._cache: torch.Tensor | None = None
        self._on_gpu = device.type == "cuda"

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def once_ms(self, call: Callable[[], Any]) -> float:
        """One call, waited for."""
        self._synchronize()
        began = time.perf_counter()
        call()
        self._synchronize()
        return 1e3 * (time.perf_counter() - began)

    def _flush(self) -> None:
        """Fill the L2 cache with something else, so that a call finds its inputs in memory."""
        if self._on_gpu:
            if self._cache is None:
                self._cache = torch.empty(FLUSH_MIB * MIB, dtype=torch.uint8, device=self.device)
            self._cache.zero_()

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The median of several calls, each between two events and after a flush of the cache, after a warm-up."""
        self.once_ms(call)
        warm = self.once_ms(call)
        if self.quick:
            return warm
        repeats = min(MOST_REPEATS, max(3, int(1e3 * SECONDS / max(warm, 1e-3))))
        if not self._on_gpu:
            return statistics.median(self.once_ms(call) for _ in range(repeats))
        events = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush()
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def device_milliseconds(self, call: Callable[[], Any]) -> float:
        """What the GPU takes for a call, without the time to launch: of a CUDA graph of many, each after a flush of the
        cache, less a graph of the flushes alone."""
        if not self._on_gpu:
            return self.milliseconds(call)

        def flushed() -> None:
            self._flush()
            call()

        return max(self._captured(flushed) - self._captured(self._flush), 0.0)

    def _captured(self, call: Callable[[], Any]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call()
        return self.milliseconds(graph.replay) / GRAPH_CALLS

    def peak_mb(self, call: Callable[[], Any]) -> float:
        """The most memory in use during a call, less what was in use before it; 0 on a CPU, where it is not known."""
        if not self._on_gpu:
            return 0.0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def forward_and_backward(self, forward: Callable[[], Any], total: Callable[[], Any]) -> Timing:
        """Both times and the peak of the second; it compiles first, so that compilation takes no part in the peak."""
        total()
        return Timing(
            peak_mb=self.peak_mb(total), forward_ms=self.milliseconds(forward), total_ms=self.milliseconds(total)
        )

    def limits(self) -> Limits:
        """Measured now, on this machine, once it is as warm as the kernels will find it."""
        size = 1 << (22 if self.quick else 32)
        source, target = torch.zeros(2, size, dtype=torch.uint8, device=self.device).unbind(0)
        copy_ms = self.milliseconds(lambda: target.copy_(source))
        width = 256 if self.quick else 8192
        until = time.monotonic() + (0.0 if self.quick else WARM_SECONDS)
        a, b = torch.randn(2, width, width, device=self.device).bfloat16().unbind(0)
        while time.monotonic() < until:
            self.once_ms(lambda: a @ b)
        matmul_ms = self.milliseconds(lambda: a @ b)
        return Limits(copy_tb_per_s=2 * size / copy_ms / 1e9, matmul_tflop_per_s=2 * width**3 / matmul_ms / 1e9)
