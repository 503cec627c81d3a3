"""Launches that overlap, in a captured graph: each kernel waits for x, words and memory of the one before."""

from __future__ import annotations

import pytest

from gpu.processes import assert_ended_well, run

pytestmark = pytest.mark.gpu

# x is the product before, and the words are written just before they are read. Bits must be those of single launches.
CHAIN = """
on_device = build(Case(4, 512, 512, 128, "perm")).to("cuda")
qweight, rest = on_device.args[0], on_device.args[1:]
words = torch.ops.exllama.gptq_unshuffle(qweight, on_device.row_order, 4)
start = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).half().cuda()

def chain(pause):
    x, results = start, []
    for _ in range(200):
        fresh = words.clone()
        torch.ops.exllama.gptq_shuffle(fresh, on_device.row_order, 4)
        pause()
        x = torch.ops.exllama.gptq_gemm(x, fresh, *rest)
        pause()
        x = torch.ops.exllama.gptq_gemm(x / x.norm(), qweight, *rest)
        x = x / x.norm()
        results.append(x)
    return results

expected = chain(torch.cuda.synchronize)
for _ in range(20):
    assert all(map(torch.equal, chain(lambda: None), expected))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = chain(lambda: None)
for _ in range(20):
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
print("done")
"""


@pytest.mark.parametrize("algorithm", ["scalar", "mma"])
def test_overlapping_launches_give_the_bits_of_single_ones(algorithm: str) -> None:
    assert_ended_well(run(CHAIN, EXLLAMA_OPS_CUDA_OVERLAP="1", EXLLAMA_OPS_CUDA_ALGORITHM=algorithm))
