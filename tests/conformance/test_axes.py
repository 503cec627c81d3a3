"""The axes of the matrix: what depends on the CPU's matmul precision, and that every instruction set is seen.

What does not depend on the precision is tested at one precision alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import exllama_ops
from conformance.backends import BACKENDS, CPU_ISAS, PRECISIONS, OnEveryIsa
from conformance.conftest import cpu_isa
from conformance.test_gemm import ORDERS, SMALL_SHAPES, activations
from conformance.weights import DTYPES, Case, Weight, build, multi_args

native = pytest.mark.skipif(len(BACKENDS) == 1, reason="is of the native CPU library")


def products(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """gptq_gemm and gptq_gemm_multi."""
    ops: Any = torch.ops.exllama
    x = activations(9, weight.case.K, dtype)
    x[3, 5] = 300.0
    return {
        "gptq_gemm": ops.gptq_gemm(x, *weight.args),
        "gptq_gemm_multi": ops.gptq_gemm_multi(x, *multi_args([weight, weight])),
    }


def others(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every other op."""
    ops: Any = torch.ops.exllama
    order = weight.row_order if weight.case.shuffled else torch.empty(0, dtype=torch.int32)
    shuffled = weight.qweight.clone()
    ops.gptq_shuffle(shuffled, order, weight.case.bits)
    return {
        "gptq_gemm_dx": ops.gptq_gemm_dx(activations(9, weight.case.N, dtype), *weight.args),
        "gptq_dequantize": ops.gptq_dequantize(*weight.args),
        "gptq_shuffle": shuffled,
        "gptq_unshuffle": ops.gptq_unshuffle(weight.qweight, order, weight.case.bits),
    }


@native
@pytest.mark.parametrize(("order", "shuffled"), ORDERS)
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_the_precision_is_that_of_products_by_groups_alone(bits: int, order: str, shuffled: bool) -> None:
    weight = build(Case(bits, *SMALL_SHAPES[bits], 16, order, shuffled))
    with cpu_isa(""):
        for dtype in DTYPES:
            found = []
            for precision in PRECISIONS:
                exllama_ops.set_cpu_matmul_precision(precision)
                found.append((products(weight, dtype), others(weight, dtype)))
            (highest, of_others), *lower = found
            for products_there, others_there in lower:
                for op, result in of_others.items():
                    assert torch.equal(others_there[op], result), op
                for op, result in highest.items():
                    # The classes of a lower precision round x in float32 too, which no float32 result hides.
                    if order == "raw" or dtype == torch.float32:
                        assert torch.equal(products_there[op], result) == (order == "raw"), op


@native
@pytest.mark.parametrize("isa", CPU_ISAS)
def test_an_instruction_set_is_under_test(isa: str) -> None:
    """What this CPU lacks is skipped with a counted reason. Every other test runs on all that it has."""
    with cpu_isa(isa) as library:
        assert library.isa_in_use() == isa


class FaultyLibrary(SimpleNamespace):
    """A library whose scalar kernels are wrong."""

    in_use = ""

    def isas(self) -> dict[str, bool]:
        return {"amx": False, "avx2": True, "scalar": True}

    def use_isa(self, isa: str) -> None:
        self.in_use = isa


def flip_a_bit(tensor: Tensor, library: FaultyLibrary) -> Tensor:
    tensor.view(torch.int32)[1] ^= int(library.in_use == "scalar")
    return tensor


def test_a_fault_of_one_instruction_set_is_seen() -> None:
    library = FaultyLibrary()
    on_every = OnEveryIsa(library)
    assert on_every.isas == ["avx2", "scalar"]
    with pytest.raises(AssertionError, match=r"scalar and avx2 differ$"):
        on_every._call(lambda x: flip_a_bit(x.clone(), library), torch.ones(3))
    with pytest.raises(AssertionError, match="scalar and avx2 differ in their arguments"):
        on_every._call(lambda x: flip_a_bit(x, library) and None, torch.ones(3))

    def refused(x: Tensor) -> None:
        raise ValueError(f"refused by {library.in_use}")

    with pytest.raises(AssertionError, match=r"scalar and avx2 differ$"):
        on_every._call(refused, torch.ones(3))


def test_what_all_instruction_sets_agree_on_is_returned_raised_and_written_once() -> None:
    on_every = OnEveryIsa(FaultyLibrary())
    buffer = torch.zeros(4)
    assert on_every._call(lambda x: x.add_(1).sum(), buffer[1:3]).item() == 2
    assert buffer.tolist() == [0, 1, 1, 0]
    assert on_every._call(lambda x: x / 0, torch.zeros(1)).isnan().all()  # NaN equals NaN
    with pytest.raises(IndexError):
        on_every._call(lambda x: x[7], buffer)
