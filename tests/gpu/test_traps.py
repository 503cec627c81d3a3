"""An index that names no row or group ends in an error of the device, and never in a result.

After such an error a process has no device, so each call has a process of its own.
"""

from __future__ import annotations

import itertools
import re

import pytest

from gpu.processes import run

pytestmark = pytest.mark.gpu

# The order of the rows, whether they are shuffled, and an index that is just outside.
ORDERS = {"perm": (True, 512), "raw": (False, -1)}
CALLS = {
    "gptq_gemm": "torch.ops.exllama.gptq_gemm(x.cuda(), *on_device.args)",
    "gptq_gemm_dx": "torch.ops.exllama.gptq_gemm_dx(torch.ones(5, 128).half().cuda(), *on_device.args)",
    "gptq_dequantize": "torch.ops.exllama.gptq_dequantize(*on_device.args)",
}
PROGRAM = """
weight = build(Case(4, 512, 128, 128, "{order}", {shuffled}))
weight.row_order[17] = {index}
on_device = weight.to("cuda")
torch.cuda.synchronize()
print("called")
{call}
torch.cuda.synchronize()
print("no error")
"""


EXPERTS = """
from conformance.weights import build_experts, experts_args

args = experts_args([expert.to("cuda") for expert in build_experts(Case(4, 512, 128, 128), 3)], {offsets})
grad = torch.ones(5, 128).half()
torch.cuda.synchronize()
print("called")
torch.ops.exllama.{op}(({x}).cuda(), *args)
torch.cuda.synchronize()
print("no error")
"""


@pytest.mark.parametrize("offsets", [(0, 3, 2, 5), (-1, 0, 2, 5), (0, 1, 2, 6)], ids=str)
@pytest.mark.parametrize(("op", "x", "algorithm"), [
    ("gptq_moe_gemm", "x", "scalar"),
    ("gptq_moe_gemm", "x", "mma"),
    ("gptq_moe_gemm", "x", "pipelined"),
    ("gptq_moe_gemm_dx", "grad", ""),
])  # fmt: skip
def test_offsets_that_are_none_are_an_error_of_the_device(
    offsets: tuple[int, ...], op: str, x: str, algorithm: str
) -> None:
    ended = run(EXPERTS.format(offsets=offsets, op=op, x=x), EXLLAMA_OPS_CUDA_ALGORITHM=algorithm)
    assert ended.stdout == "called\n", ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert re.search("CUDA error|launch failure", ended.stderr), ended.stderr


@pytest.mark.parametrize(("order", "op", "algorithm"), [
    (order, op, algorithm)
    for order, op in itertools.product(ORDERS, CALLS)
    for algorithm in (("scalar", "mma", "tiled", "dense") if op == "gptq_gemm" else ("",))
    if (order, algorithm) != ("raw", "mma")
])  # fmt: skip
def test_a_bad_index_is_an_error_of_the_device(order: str, op: str, algorithm: str) -> None:
    shuffled, index = ORDERS[order]
    program = PROGRAM.format(order=order, shuffled=shuffled, index=index, call=CALLS[op])
    ended = run(program, EXLLAMA_OPS_CUDA_ALGORITHM=algorithm)
    assert ended.stdout == "called\n", ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert re.search("CUDA error|launch failure", ended.stderr), ended.stderr
