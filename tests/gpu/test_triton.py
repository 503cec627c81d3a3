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


@pytest.mark.parametrize("program", [SERVE, CAPTURE], ids=["serves", "is_captured"])
def test_triton_serves_cuda_tensors(program: str) -> None:
    if reasons := triton.BACKEND.reasons_against("gptq_gemm", "CUDA"):
        pytest.skip(f"needs Triton: {'; '.join(reasons)}")
    assert_ended_well(run(program, EXLLAMA_OPS_BACKEND="triton"))
