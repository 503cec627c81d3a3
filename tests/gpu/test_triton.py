"""Triton as the backend that serves CUDA tensors: in a process that names it, and in a graph."""

from __future__ import annotations

import pytest

from exllama_ops.backends import triton
from gpu.processes import assert_ended_well, run

pytestmark = pytest.mark.gpu

SERVE = """
from exllama_ops import backends
from triton_backend import bounds as triton_bounds

assert {choice.backend.name for choice in backends.report() if choice.dispatch_key == "CUDA"} == {"triton"}
for bits in (2, 3, 4, 8):
    for order, shuffled in (("sorted", True), ("perm", True), ("filled", True), ("raw", False)):
        weight = build(Case(bits, 512, 128, 64, order, shuffled))
        on_device = weight.to("cuda")
        assert torch.equal(
            torch.ops.exllama.gptq_dequantize(*on_device.args).cpu(), weight.dense.float().half()
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for M in (1, 17, 300):
                x = torch.randn(M, 512, generator=torch.Generator().manual_seed(M)).to(dtype)
                out = torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args)
                error = triton_bounds.gemm_error(x.cuda(), on_device, truncates=True)
                assert_within_bound(out, x, weight.dense, error)
                assert torch.equal(out, torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args))
print("done")
"""
CAPTURE = """
on_device, x_on_device = weight.to("cuda"), x.cuda()
expected = torch.ops.exllama.gptq_gemm(x_on_device, *on_device.args)  # compiles
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = torch.ops.exllama.gptq_gemm(x_on_device, *on_device.args)
graph.replay()
assert torch.equal(out, expected)
x_on_device.mul_(2)
graph.replay()
assert torch.equal(out, torch.ops.exllama.gptq_gemm(x_on_device, *on_device.args))
print("done")
"""
# K is split, so each product needs tickets that none of those has that run at the same time.
AT_A_TIME = """
from exllama_ops.backends.triton import tickets

weights = [build(Case(4, 4096, columns, 128)).to("cuda") for columns in (512, 640)]
xs = [torch.randn(1, 4096, generator=torch.Generator().manual_seed(i)).half().cuda() for i in range(2)]

def products(i):
    return [torch.ops.exllama.gptq_gemm(xs[i], *weights[i].args) for _ in range(20)]

expected = [products(i)[0] for i in range(2)]
graphs, of_graphs = [torch.cuda.CUDAGraph() for _ in range(2)], []
for i, graph in enumerate(graphs):
    with torch.cuda.graph(graph):
        of_graphs.append(products(i))
streams = [torch.cuda.Stream() for _ in range(4)]
torch.cuda.synchronize()
for _ in range(50):
    of_streams = []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            graphs[i].replay() if i < 2 else of_streams.append(products(i - 2))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(out, expected[i]) for out in of_graphs[i] + of_streams[i])
(sets,) = tickets._sets.values()
assert len(sets._of_user) == 5  # of the first stream, two graphs and two streams
assert not sets._tickets.any()
print("done")
"""


@pytest.mark.parametrize("program", [SERVE, CAPTURE, AT_A_TIME], ids=["serves", "is_captured", "at_a_time"])
def test_triton_serves_cuda_tensors(program: str) -> None:
    if reasons := triton.BACKEND.reasons_against("gptq_gemm", "CUDA"):
        pytest.skip(f"needs Triton: {'; '.join(reasons)}")
    assert_ended_well(run(program, EXLLAMA_OPS_BACKEND="triton"))
