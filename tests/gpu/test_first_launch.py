"""A kernel whose first launch of all is one that a graph captures: its module is loaded in the capture."""

from __future__ import annotations

import pytest
import torch

from cuda.test_emulated import ALGORITHMS
from gpu.processes import assert_ended_well, run

pytestmark = pytest.mark.gpu

CAPTURE = """
import os
on_device, x_on_device = weight.to("cuda"), x.cuda()
torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # BLAS makes its handle outside of captures
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = torch.ops.exllama.gptq_gemm(x_on_device, *on_device.args)
    rest = (
        torch.ops.exllama.gptq_dequantize(*on_device.args),
        torch.ops.exllama.gptq_unshuffle(on_device.qweight, on_device.row_order, 4),
        torch.ops.exllama.gptq_gemm_dx(out, *on_device.args),
    )
graph.replay()
torch.cuda.synchronize()
algorithm = os.environ["EXLLAMA_OPS_CUDA_ALGORITHM"]
assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, x.dtype))
again = torch.ops.exllama.gptq_gemm(x_on_device, *on_device.args)
assert torch.equal(out, again)
assert torch.equal(rest[0].cpu(), weight.dense.float().half())
assert torch.equal(rest[2], torch.ops.exllama.gptq_gemm_dx(out, *on_device.args))
print("done")
"""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_first_launch_may_be_captured(algorithm: str) -> None:
    if algorithm == "mma" and torch.cuda.get_device_capability() < (7, 5):
        pytest.skip("needs tensor cores of sm_75 or later")
    assert_ended_well(run(CAPTURE, EXLLAMA_OPS_CUDA_ALGORITHM=algorithm))
