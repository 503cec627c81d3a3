"""torch.library.opcheck and the agreement of fake and real, for every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample import SAMPLES, op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from conformance.weights import DTYPES, Case
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.ops import _library

CASES = [
    Case(bits, 96, 64, 40, order, shuffled, v2, scales_dtype)
    for bits in SUPPORTED_BITS
    for order, shuffled, v2, scales_dtype in [
        ("sorted", True, True, torch.float16),
        ("perm", True, False, torch.bfloat16),
        ("raw", False, True, torch.float32),
    ]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str, case: Case, dtype: torch.dtype) -> None:
    if dtype != torch.float16 and name in ("gptq_shuffle", "gptq_unshuffle", "gptq_dequantize"):
        pytest.skip("the op has no activations")
    args = SAMPLES[name](case, dtype)
    if "gemm" in name and "." not in name:
        args[0].requires_grad_()
    torch.library.opcheck(_library.overload(name), args)


@pytest.mark.parametrize("M", [0, 1, 2, 33])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_fake_equals_real_in_all_but_the_data(name: str, case: Case, M: int) -> None:
    for dtype in DTYPES:
        args = SAMPLES[name](case, dtype, M)
        real = op(name)(*args)
        meta = op(name)(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args))
        with FakeTensorMode() as mode:
            fake = op(name)(*tree_map_only(torch.Tensor, mode.from_tensor, args))
        assert description(fake) == description(real)
        assert description(meta) == description(real.to("meta") if real is not None else None)


def description(result: torch.Tensor | None) -> Any:
    if result is None:
        return None
    return result.shape, result.stride(), result.dtype, result.device, result.storage_offset(), result.requires_grad


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_cuda_tensors_trace_without_a_gpu(name: str) -> None:
    args = SAMPLES[name](CASES[0], torch.float16)
    with FakeTensorMode():
        cuda = tree_map_only(torch.Tensor, lambda arg: torch.empty(arg.shape, dtype=arg.dtype, device="cuda"), args)
        result = op(name)(*cuda)
    assert result is None or result.device.type == "cuda"
