"""The ops of vLLM's generations, each called with the very arguments that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.weights import Case, Weight, build
from exllama_ops.integrations.vllm import signatures
from exllama_ops.layout.formats import SUPPORTED_BITS

K, N = 96, 32
NONE = torch.empty(0, dtype=torch.int32)
ON_META = torch.empty(0, dtype=torch.int32, device="meta")


def until_0_11_0(x: Tensor, w: Weight, order: Tensor) -> Tensor:
    return signatures.gptq_gemm_until_0_11_0(x, w.qweight, w.qzeros, w.scales, order, w.case.shuffled, w.case.bits)


def until_0_29(x: Tensor, w: Weight, order: Tensor) -> Tensor:
    return signatures.gptq_gemm_until_0_29(
        x, w.qweight, w.qzeros, w.scales, order, w.case.shuffled, w.case.v2, w.case.bits
    )


def since_0_30(x: Tensor, w: Weight, order: Tensor) -> Tensor:
    return signatures.gptq_gemm_since_0_30(x, w.qweight, w.qzeros, w.scales, w.case.shuffled, w.case.v2, w.case.bits)


def of_sgl_kernel(x: Tensor, w: Weight, order: Tensor) -> Tensor:
    return signatures.gptq_gemm_of_sgl_kernel(x, w.qweight, w.qzeros, w.scales, order, w.case.shuffled, w.case.bits)


GENERATIONS = [until_0_11_0, until_0_29, since_0_30, of_sgl_kernel]


LAYOUTS = [("sorted", True), ("sorted", False), ("perm", True), ("raw", False)]
CALLS = [
    (gemm, order, shuffled, v2)
    for gemm in GENERATIONS
    for order, shuffled in LAYOUTS
    for v2 in (False, True)
    if not (v2 and gemm in (until_0_11_0, of_sgl_kernel))  # which knew one rule of zero points
    and (order == "sorted" or gemm is not since_0_30)
]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize(("gemm", "order", "shuffled", "v2"), CALLS)
def test_each_generation_multiplies_by_the_weight_that_its_arguments_mean(
    gemm: Callable[..., Tensor], order: str, shuffled: bool, v2: bool, bits: int
) -> None:
    weight = build(Case(bits, K, N, 32, order, shuffled=shuffled, v2=v2))
    rows = torch.eye(K, dtype=torch.float16)
    assert torch.equal(gemm(rows, weight, weight.row_order), weight.dense.half())


@pytest.mark.parametrize("gemm", [until_0_11_0, until_0_29, of_sgl_kernel])
@pytest.mark.parametrize("null", [NONE, ON_META], ids=["empty", "meta"])
def test_what_was_a_null_pointer_is_no_order_of_rows(gemm: Callable[..., Tensor], null: Tensor) -> None:
    weight = build(Case(4, K, N, 32, v2=False))
    assert torch.equal(gemm(torch.eye(K).half(), weight, null), weight.dense.half())


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("order", ["sorted", "perm"])
def test_a_weight_is_shuffled_as_each_generation_did(order: str, bits: int) -> None:
    stored, shuffled = (build(Case(bits, K, N, 32, order, shuffled=flag)) for flag in (False, True))
    words = stored.qweight.clone()
    signatures.gptq_shuffle_until_0_29(words, shuffled.row_order, bits)
    assert torch.equal(words, shuffled.qweight)
    if order == "sorted":
        words = stored.qweight.clone()
        signatures.gptq_shuffle_since_0_30(words, bits)
        assert torch.equal(words, shuffled.qweight)
        words = stored.qweight.clone()
        signatures.gptq_shuffle_until_0_29(words, ON_META, bits)
        assert torch.equal(words, shuffled.qweight)


WEIGHT = build(Case(4, K, N, 32, "perm", v2=False))
X = torch.ones(2, K, dtype=torch.float16)
FIRST = (X, WEIGHT.qweight, WEIGHT.qzeros, WEIGHT.scales)
PERM = WEIGHT.row_order


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        # The arguments of 0.30 in 0.11.0, and the other way round: there are seven of each.
        ("gptq_gemm_until_0_11_0", (*FIRST, True, False, 4), "b_g_idx must be a Tensor; got True"),
        ("gptq_gemm_since_0_30", (*FIRST, PERM, True, 4), "use_exllama must be a bool; got a Tensor"),
        ("gptq_gemm_of_sgl_kernel", (*FIRST, True, False, 4), "b_g_idx must be a Tensor; got True"),
        # Those of torch.ops.exllama, whose rule of zero points is the last.
        ("gptq_gemm_until_0_29", (*FIRST, PERM, True, 4, False), "use_v2_format must be a bool; got 4"),
        ("gptq_gemm_until_0_29", (*FIRST, PERM, True, False, True), "bit must be an int; got True"),
        ("gptq_gemm_until_0_29", (*FIRST, None, True, False, 4), "b_g_idx must be a Tensor; got None"),
        ("gptq_shuffle_until_0_29", (WEIGHT.qweight, 4, 4), "q_perm must be a Tensor; got 4"),
        ("gptq_shuffle_since_0_30", (WEIGHT.qweight, PERM), "bit must be an int; got a Tensor"),
        # What no generation looked at.
        ("gptq_gemm_until_0_11_0", (*FIRST, PERM, True, 5), "bit must be one of"),
        ("gptq_gemm_until_0_11_0", (X.t(), *FIRST[1:], PERM, True, 4), "x must "),
    ],
)
def test_arguments_of_another_generation_are_refused(function: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(signatures, function)(*arguments)


def test_another_number_of_arguments_is_refused_by_a_name_that_says_the_generation() -> None:
    with pytest.raises(TypeError, match=r"gptq_gemm_until_0_11_0\(\) takes 7 .* 8 were given"):
        signatures.gptq_gemm_until_0_11_0(*FIRST, PERM, True, False, 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"gptq_shuffle_since_0_30\(\) takes 2 .* 3 were given"):
        signatures.gptq_shuffle_since_0_30(WEIGHT.qweight, PERM, 4)  # type: ignore[call-arg]


@pytest.mark.parametrize("gemm", GENERATIONS)
def test_each_generation_traces_without_a_break(gemm: Callable[..., Tensor]) -> None:
    weight = build(Case(4, K, N, 32, v2=False))

    def forward(x: Tensor, order: Tensor) -> Tensor:
        words = weight.qweight.clone()
        if gemm is since_0_30:
            signatures.gptq_shuffle_since_0_30(words, 8)  # which keeps 8-bit words as they are
        else:
            signatures.gptq_shuffle_until_0_29(words, order, 8)
        return gemm(x, weight, order) + words.sum()

    x = torch.randn(3, K).half()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, NONE), forward(x, NONE))
