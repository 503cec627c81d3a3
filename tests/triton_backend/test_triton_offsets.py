"""Offsets beyond 32 bits, of the compiled kernels: of a launch the last block alone, on memory that is hardly there.

A weight lies in the last columns of one with so many that words, scales, zero points and their bits are beyond 2**31.
Rows of x or grad are the last of as many.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from conformance.weights import Case, Weight, build
from cuda.plain import sparse
from exllama_ops.backends.triton import gemm, gemm_dx, ops, shuffle, splits, tiles
from exllama_ops.layout.weight import Weight as Packed
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import reasons_against
from triton_backend import bounds
from triton_backend.emulated import A100, EmulatedDriver

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

SLOW = pytest.mark.slow
COLUMNS = 64  # of the last block
BEYOND = 2**31


@pytest.fixture
def last_block(device: EmulatedDriver) -> EmulatedDriver:
    device.only_last_block = True
    torch.use_deterministic_algorithms(False)  # which would write into all of a result
    return device


def zeros(*shape: int, dtype: Any) -> Tensor:
    return torch.from_numpy(sparse(*shape, dtype=dtype))


def widened(weight: Weight, N: int) -> Weight:
    """A weight with ``N`` columns, of which the last are those of ``weight``."""
    tensors = {}
    for name, columns in (("qweight", N), ("qzeros", N // 8), ("scales", N)):
        small = getattr(weight, name)
        tensors[name] = zeros(len(small), columns, dtype=small.numpy().dtype)
        tensors[name][:, -small.shape[1] :] = small
    return replace(weight, **tensors)


@pytest.mark.parametrize(("form", "M"), [("gemv", 1), pytest.param("dot", 2, marks=SLOW)])
def test_columns_of_a_product(last_block: EmulatedDriver, form: str, M: int) -> None:
    weight = build(Case(4, 2048, COLUMNS, 32))
    wide = widened(weight, 2**29 + COLUMNS)
    packed = Packed.of(*wide.args)
    assert packed.qzeros.numel() > BEYOND
    x = torch.randn(M, 2048, generator=torch.Generator().manual_seed(1)).half()
    plan = tiles.plan_gemm(M, packed, x.dtype, A100, False)
    assert (plan.form, plan.splits) == (form, 1)
    out = gemm.compute(plan.tile, [plan], x, [packed])[:, -COLUMNS:].contiguous()
    assert_within_bound(out, x, weight.dense, bounds.gemm_error(x, wide, truncates=True))


@pytest.mark.parametrize(
    ("form", "dtype"), [("gemv", torch.float32), *(pytest.param(f, torch.float16, marks=SLOW) for f in ("dot", "dx"))]
)
def test_rows_of_a_product(last_block: EmulatedDriver, form: str, dtype: torch.dtype) -> None:
    """Batch-invariant mode has gemv take any number of rows."""
    weight = build(Case(4, 128, COLUMNS, 128))
    packed, M = Packed.of(*weight.args), BEYOND // COLUMNS + 1
    K, dense = (COLUMNS, weight.dense.t()) if form == "dx" else (128, weight.dense)
    x = zeros(M, K, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
    x[-1] = torch.linspace(-1, 1, K)
    if form == "dx":
        out = gemm_dx.compute_dx(tiles.plan_dx(4, A100), x, packed)
        error = bounds.dx_error(COLUMNS)
    else:
        plan = tiles.plan_gemm(M, packed, dtype, A100, form == "gemv")
        assert (plan.form, plan.splits) == (form, 1)
        out = gemm.compute(plan.tile, [plan], x, [packed])
        error = bounds.gemm_error(x, weight, truncates=True)
    assert out.numel() > BEYOND
    assert_within_bound(out[-1:, -COLUMNS:], x[-1:], dense[:, -COLUMNS:], error)


@SLOW
def test_sums_of_splits(last_block: EmulatedDriver) -> None:
    elements = BEYOND + 4
    partials, out = zeros(2, elements, dtype=np.float32), zeros(elements, dtype=np.float16)
    partials[:, -4:] = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    splits.add_splits(partials, out, (4,), [2])
    assert out[-4:].tolist() == [11, 22, 33, 44]


@SLOW
def test_rows_of_dequantize(last_block: EmulatedDriver) -> None:
    weight = build(Case(4, 40, COLUMNS, 8))
    out = ops.gptq_dequantize(*widened(weight, 2**26 + COLUMNS).args)
    assert out.numel() > BEYOND
    assert torch.equal(out[:, -COLUMNS:], weight.dense.half())


@SLOW
@pytest.mark.parametrize("order", ["sorted", "perm"])
def test_words_that_are_shuffled(last_block: EmulatedDriver, order: str) -> None:
    weight = build(Case(4, 4096, COLUMNS, 128, order))
    N = 2**23 + COLUMNS
    checkpoint = zeros(512, N, dtype=np.int32)
    checkpoint[:, -COLUMNS:] = build(Case(4, 4096, COLUMNS, 128, order, shuffled=False)).qweight
    assert checkpoint.numel() > BEYOND
    out = zeros(512, N, dtype=np.int32)
    shuffle._reorder(checkpoint, weight.row_order, out, 4, from_shuffled=False, to_shuffled=True)
    assert torch.equal(out[-shuffle.BLOCK_B :, -COLUMNS:], weight.qweight[-shuffle.BLOCK_B :])
