"""What the benchmark of experts multiplies, and that its ways agree."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import exllama_ops
from benchmarks import expert_layers, experts
from benchmarks.peers import openvino_experts, vllm_experts

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


@pytest.mark.parametrize("act_order", [False, True])
def test_copies_hold_the_same_stacks(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = experts.stacks(SMALL, act_order)
    monkeypatch.setattr(experts, "COPIES_BYTES", 2 * sum(tensor.nbytes for tensor in weights) + 1)
    copies = experts.copies(weights)
    assert len(copies) == 3
    for copy in copies:
        assert all(torch.equal(mine, given) for mine, given in zip(copy, weights, strict=True))


def test_the_floor_is_what_takes_longer() -> None:
    # 4 bits a value, and a scale and a zero point for 128 of them.
    nbytes, operations = 4 * 256 * 64 * (4 + 20 / 128) / 8, 2 * 5 * 2 * 256 * 64
    assert experts._floor(SMALL, 5, 4, {"dram": 1.0, "int16": 1e9}) == nbytes
    assert experts._floor(SMALL, 5, 4, {"dram": 1e9, "int16": 1.0}) == operations


def test_a_layer_is_what_its_experts_compute() -> None:
    layer = expert_layers.Experts(expert_layers.Sizes("small", 4, 2, 256, 128))
    x, weights = torch.randn(5, 256), torch.rand(5, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    exact = layer.compute(x, ids, weights)
    y = expert_layers._with_precision(expert_layers._ours(layer), "highest", x, ids, weights)
    exllama_ops.set_cpu_matmul_precision("high")
    assert (y - exact).norm() < 1e-5 * exact.norm()  # sums of 256 float32


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    said: list[str] = []
    layer = expert_layers._layer(expert_layers.Experts(expert_layers.Sizes("small", 4, 2, 256, 128)), said.append)
    assert list(layer.ways) == [expert_layers.OURS, expert_layers.MEDIUM]
    assert [line.split(": ")[1] for line in said] == list(vllm_experts.WAYS)


def test_openvino_multiplies_by_the_integers_of_the_stacks() -> None:
    pytest.importorskip("openvino")
    E, K, N = SMALL.E, SMALL.K, SMALL.N
    words = experts.stacks(SMALL, act_order=False)[:3]
    bind = openvino_experts.WAYS["OpenVINO fp32"](words, K, N, 1)
    x, offsets = torch.randn(10, K), torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    out = torch.from_numpy(bind(x, offsets)().data.copy()).double()
    q, zeros = (
        torch.stack([(byte := tensor.view(torch.uint8)) & 15, byte >> 4], -1).view(E, N, K // experts.GROUP_SIZE, -1)
        for tensor in words[:2]
    )
    W = ((q.double() - zeros) * words[2].view(*zeros.shape).double()).view(E, N, K)
    for expert, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        rows = x[start:stop].double()
        error = (out[start:stop] - rows @ W[expert].T).abs()
        assert (error <= K * 2**-24 * (rows.abs() @ W[expert].T.abs())).all()
