"""What only a GPU can show beyond the conformance matrix (which runs there too): streams, graphs, no syncs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from conformance.weights import Case, build
from exllama_ops import ExllamaLinear, quantize

pytestmark = pytest.mark.gpu

CASES = [
    Case(bits, 256, 128, 64, order, shuffled)
    for bits in (2, 3, 4, 8)
    for order, shuffled in [("sorted", True), ("perm", True), ("raw", False)]
]


@pytest.fixture(autouse=True)
def sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_op_syncs_with_the_host(case: Case) -> None:
    weight = build(case).to("cuda")
    x, grad = torch.randn(5, 256).cuda(), torch.randn(5, 128).cuda()
    perm = weight.rows if case.shuffled else torch.empty(0, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    torch.ops.exllama.gptq_gemm(x, *weight.args)
    torch.ops.exllama.gptq_gemm_dx(grad, *weight.args)
    torch.ops.exllama.gptq_dequantize(*weight.args)
    torch.ops.exllama.gptq_unshuffle(weight.qweight, perm, case.bits)
    torch.ops.exllama.gptq_shuffle(weight.qweight, perm, case.bits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_graph_replays_with_new_data(case: Case) -> None:
    weight = build(case).to("cuda")
    x = torch.randn(5, 256, dtype=torch.float16, device="cuda")
    torch.ops.exllama.gptq_gemm(x, *weight.args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    for seed in range(3):
        x.copy_(torch.randn(5, 256, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, torch.ops.exllama.gptq_gemm(x, *weight.args))


def test_the_current_stream_is_used() -> None:
    """The result waits for what runs before it on the side stream, and not for the default stream."""
    weight = build(CASES[0]).to("cuda")
    x = torch.zeros(5, 256, device="cuda")
    data = torch.randn(5, 256, device="cuda")
    expected = torch.ops.exllama.gptq_gemm(data, *weight.args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(data)
        out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    side.synchronize()
    assert torch.equal(out, expected)


def test_reduce_overhead_replays_cuda_graphs() -> None:
    model = nn.Sequential(
        ExllamaLinear.from_weight(quantize(torch.randn(128, 256), 4, 64)),
        nn.SiLU(),
        ExllamaLinear.from_weight(quantize(torch.randn(256, 128), 3, 64)),
    ).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for seed in range(5):
            x = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)).half().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=4e-3, atol=0.05)


def test_results_on_gpu_and_cpu_agree_to_one_rounding() -> None:
    weight = build(CASES[1])
    x = torch.randn(9, 256)
    cpu = torch.ops.exllama.gptq_gemm(x, *weight.args)
    cuda = torch.ops.exllama.gptq_gemm(x.cuda(), *weight.to("cuda").args).cpu()
    torch.testing.assert_close(cuda, cpu, rtol=1e-5, atol=1e-5)
