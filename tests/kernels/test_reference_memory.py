"""The PyTorch backend works through tokens in chunks: N x V in fp32 never exists. Peaks as the kernel counts them."""

import os
import subprocess
import sys

import pytest

TOKENS, COLUMNS, WIDTH = 8192, 16384, 8
WHOLE_MB = 4 * TOKENS * COLUMNS >> 20  # 512

PROGRAM = f"""
import re
import sys
import torch
import ctrl_kernels

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

def run(tokens):
    targets = torch.arange(tokens)
    if sys.argv[1] == "token_logprobs":
        leaves = [torch.ones(tokens, {COLUMNS}, dtype=torch.bfloat16, requires_grad=True)]
        call = lambda: sum(ctrl_kernels.token_logprobs(*leaves, targets, return_entropy=True, backend="torch"))
    else:
        leaves = [torch.randn(n, {WIDTH}, requires_grad=True) for n in (tokens, {COLUMNS})]
        call = lambda: sum(ctrl_kernels.linear_token_logprobs(*leaves, targets, return_entropy=True, backend="torch"))
    if sys.argv[1] == "linear_policy_loss":
        ones = torch.ones(tokens)
        call = lambda: ctrl_kernels.linear_policy_loss(*leaves, targets, -9 * ones, ones, ones, backend="torch")[0]
    before = peak_mb()
    call().sum().backward()
    grown_mb = peak_mb() - before
    assert all(leaf.grad.sum().isfinite() for leaf in leaves)
    return grown_mb

run(16)  # whatever a first call loads
print(run({TOKENS}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "results_mb"),
    [("token_logprobs", WHOLE_MB / 2), ("linear_token_logprobs", 0), ("linear_policy_loss", 0)],
)
def test_peak(function: str, results_mb: float) -> None:
    """Beyond the inputs and ``results_mb`` of gradients, less than a quarter of N x V in fp32."""
    # Every large tensor from the system and back to it: else the peak is also what malloc keeps for later.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, function], capture_output=True, text=True, timeout=300, check=False, env=exact
    )
    assert finished.returncode == 0, finished.stderr
    grown_mb = float(finished.stdout)
    assert 0 < grown_mb < results_mb + WHOLE_MB / 4, grown_mb
