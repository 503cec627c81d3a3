"""What the benchmark of experts multiplies, and that its ways agree."""

from __future__ import annotations

import pytest
import torch

from benchmarks import experts

SMALL = experts.Projection("small", "up", 4, 2, 256, 64)


@pytest.mark.parametrize("routing", experts.ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_each_token_takes_top_k_experts(tokens: int, routing: str) -> None:
    counts = experts.offsets_of(SMALL, tokens, routing).diff()
    assert counts.sum() == tokens * SMALL.top_k
    assert counts.max() <= tokens  # no expert twice


def test_a_skewed_routing_has_favourites() -> None:
    counts = experts.offsets_of(experts.PROJECTIONS[2], 512, "skewed").diff()
    assert counts[0] > 4 * counts[64:].float().mean()


@pytest.mark.parametrize("act_order", [False, True])
def test_the_loop_computes_what_the_op_does(act_order: bool) -> None:
    weights, offsets = experts.stacks(SMALL, act_order), experts.offsets_of(SMALL, 5, "uniform")
    x = torch.randn(10, SMALL.K).bfloat16()
    options = (True, experts.BITS, True, experts.GROUP_SIZE)
    got = torch.ops.exllama.gptq_moe_gemm(x, *weights, offsets, *options)
    assert torch.equal(got, experts._loop(x, weights, offsets.tolist(), options))
