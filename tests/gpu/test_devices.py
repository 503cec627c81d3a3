"""Two GPUs: a call runs where its tensors are, on that device's stream, and leaves the other as it was."""

from __future__ import annotations

import pytest
import torch

from conformance.weights import Case, build
from gpu.processes import assert_ended_well, run

needs_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
pytestmark = [pytest.mark.gpu, needs_two_devices]

CASE = Case(4, 512, 128, 128, "perm")

ONLY_THE_SECOND = """
on_device, x = weight.to("cuda:1"), x.to("cuda:1")
torch.ops.exllama.gptq_gemm(x, *on_device.args)
torch.cuda.synchronize(1)
assert torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0), "a call made a context on a device that has nothing to do with it"
print("done")
"""


def test_a_call_runs_where_its_tensors_are() -> None:
    weight, x = build(CASE), torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    first, second = (
        torch.ops.exllama.gptq_gemm(x.to(device), *weight.to(device).args) for device in ("cuda:0", "cuda:1")
    )
    assert second.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert torch.equal(first.cpu(), second.cpu())


def test_the_stream_is_that_of_the_tensors_device() -> None:
    weight = build(CASE).to("cuda:1")
    data = torch.randn(5, 512, device="cuda:1")
    expected = torch.ops.exllama.gptq_gemm(data, *weight.args)
    side, x = torch.cuda.Stream("cuda:1"), torch.zeros_like(data)
    side.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(data)
        with torch.cuda.device(0):
            out = torch.ops.exllama.gptq_gemm(x, *weight.args)
    side.synchronize()
    assert torch.equal(out, expected)


def test_no_context_is_made_on_another_device() -> None:
    assert_ended_well(run(ONLY_THE_SECOND))
