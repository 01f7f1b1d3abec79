"""Two and four gloo ranks with uneven shards against float64, the number of collectives, and the same bits for any."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctrl_kernels
import pytest
import torch
from kernel_oracle import dense_logprobs, relative_error
from vocabulary_ranks import BACKENDS, EVEN_COLUMNS, POLICY, UNEVEN, VOCABULARY, even_inputs, functions, inputs

TIMEOUT_S = 240.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo moves CPU tensors; kernels run on the GPU here"),
]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank found."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{world}")
    script = Path(__file__).with_name("vocabulary_ranks.py")
    started = []
    try:
        for rank in range(world):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                command = [sys.executable, str(script), str(folder), str(world), str(rank)]
                environment = {**os.environ, "TRITON_INTERPRET": "1"}
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)]


def exact(name: str, temperature: float) -> list[torch.Tensor]:
    """Outputs and gradients, over the whole vocabulary, in float64."""
    given = {key: x.double() if x.is_floating_point() else x for key, x in inputs().items()}
    targets, upstream = given["targets"], list(given["upstream"])
    if name == "token_logprobs":
        leaves = [given["logits"].requires_grad_()]
        logits = leaves[0]
    else:
        leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]
        logits = leaves[0] @ leaves[1].T
    if name == "linear_policy_loss":
        targets = torch.where(given["mask"], targets, -100)
    outputs = dense_logprobs(logits, targets, temperature=temperature, vocab_size=VOCABULARY)
    if name == "linear_policy_loss":
        logprobs, entropy = (x[None] for x in outputs)
        constants = {key: given[key][None] for key in ("old_logprobs", "advantages", "ref_logprobs")}
        mask = (targets != -100)[None]
        outputs = ctrl_kernels.policy_loss(logprobs, mask=mask, entropy=entropy, **constants, **POLICY)[:1]
        upstream = [torch.ones((), dtype=torch.float64)]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]


FUNCTIONS = ["token_logprobs", "linear_token_logprobs", "linear_token_logprobs saved", "linear_policy_loss"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_rank_has_the_whole_vocabularys_results(
    ranks: list[dict[Any, Any]], name: str, backend: str, temperature: float
) -> None:
    expected = exact(name.split()[0], temperature)
    found = [rank[backend, temperature][name] for rank in ranks]
    sharded = len(expected) - 1  # the last gradient: each rank has its columns' part
    for index, value in enumerate(expected[:sharded]):
        for outputs in found:
            assert relative_error(outputs[index], value) < 2e-6
            assert torch.equal(outputs[index], found[0][index])
    dim = 1 if name == "token_logprobs" else 0
    gradient = torch.cat([outputs[sharded] for outputs in found], dim)
    assert relative_error(gradient, expected[sharded]) < 3e-6
    assert gradient.narrow(dim, VOCABULARY, gradient.shape[dim] - VOCABULARY).count_nonzero() == 0
    bounds = UNEVEN[len(ranks)]
    assert [outputs[sharded].shape[dim] for outputs in found] == [b - a for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_collective_a_direction(ranks: list[dict[Any, Any]], backend: str) -> None:
    for rank in ranks:
        found = rank[backend, 1.0]
        assert found["token_logprobs collectives"] == (1, 0)
        assert found["linear_token_logprobs collectives"] == (1, 1)
        assert found["linear_token_logprobs saved collectives"] == (1, 1)
        one_pass = found["linear_policy_loss collectives"]
        # One pass, all forward: a gather for its one chunk of tokens and the sum of the hidden states' gradient.
        assert one_pass == ((2, 0) if backend == "triton" else (1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_ranks(ranks: list[dict[Any, Any]], dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) if name in ("logits", "hidden", "weight") else x for name, x in even_inputs().items()}
    alone = functions(given, slice(0, EVEN_COLUMNS), backend="triton")
    found = [rank["even", dtype] for rank in ranks]
    for name in FUNCTIONS:
        outputs = alone[name]
        first_gradient = len(outputs) - (1 if name == "token_logprobs" else 2)
        for index in range(first_gradient):
            assert all(torch.equal(rank[name][index], outputs[index]) for rank in found)
        dim = 1 if name == "token_logprobs" else 0
        assert torch.equal(torch.cat([rank[name][-1] for rank in found], dim), outputs[-1])
