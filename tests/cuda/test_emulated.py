"""The CUDA kernels, as nvcc compiles them, on an emulated device: every algorithm against the declared bounds.

Without --slow these are minutes on one core from an empty cache. They run the PTX for sm_80 with 4 and 3 bits by every
algorithm, and 2 and 8 bits by the kernels that have code of their own. They run the PTX for sm_75 where it differs.
With --slow they run every width, order and group size, for sm_90 too.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from conformance.extremes import extremes
from conformance.weights import BLOCK_VALUES, DTYPES, Case, Weight, build, build_parts, multi_args
from cuda import bounds, emulated
from exllama_ops.testing.bounds import assert_within_bound
from ptx_emulator.emulator import EmulationError, reasons_against

pytestmark = pytest.mark.skipif(bool(reasons_against()), reason=f"cannot emulate: {', '.join(reasons_against())}")

ARCHS = (80, 75, 90)
ORDERS = [("sorted", True), ("perm", True), ("sorted", False), ("raw", False)]
ALGORITHMS = ("scalar", "mma", "pipelined", "tiled", "dense")
MMA_UNIT = 32  # rows of W, of which every group must have a whole number in gemm_mma
# (K, N): beyond a stage, a run and a tile, and no multiple of them.
SHAPES = {2: (592, 80), 3: (544, 96), 4: (552, 72), 8: (548, 68)}


def on(arch: int, *values: Any, quick: bool) -> Any:
    """A parameter set for `ops` and others, slow unless it is quick."""
    name = "-".join([f"sm_{arch}", *(str(value).removeprefix("torch.") for value in values)])
    return pytest.param(arch, *values, id=name, marks=[] if quick else [pytest.mark.slow])


@pytest.fixture
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[emulated.EmulatedOps]:
    emulated_ops = emulated.ops(request.param)
    torch.use_deterministic_algorithms(True)  # fresh memory is poisoned
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch now refuses its BLAS
    yield emulated_ops
    torch.use_deterministic_algorithms(False)
    emulated_ops.device.set_order("ascending")
    emulated_ops.device.set_mma()
    emulated_ops.device.set_current_device(0)


def can(algorithm: str, arch: int, case: Case, dtype: torch.dtype) -> bool:
    """Which algorithms can compute a case, as README and the headers gemm_*.h say."""
    if algorithm in ("mma", "pipelined"):
        tensor_cores = arch >= {torch.float16: 75, torch.bfloat16: 80}.get(dtype, math.inf)
        one_group = case.group_size >= case.K
        runs = case.group_size % 128 == 0 or one_group  # of 128 rows, which lie in one group
        if algorithm == "pipelined" and (arch < 80 or (case.bits == 3 and not runs)):
            return False
        return tensor_cores and case.shuffled and (case.group_size % MMA_UNIT == 0 or one_group)
    return algorithm != "dense" or dtype == torch.float16 or (dtype == torch.bfloat16 and arch >= 80)


def cases(bits: int) -> list[Case]:
    K, N = SHAPES[bits]
    return [
        Case(bits, K, N, size, order, shuffled, v2=(size + bits) % 3 != 0)
        for size in (8, 24, 32, 48, 64, 96, 128, 256, K)
        for order, shuffled in ORDERS
    ]


ALL_CASES = [case for bits in SHAPES for case in cases(bits)]


# The case that runs on every architecture by every algorithm.
EVERYWHERE = Case(4, *SHAPES[4], 128, "perm", v2=False)


def is_quick(case: Case) -> bool:
    if case.bits == 4:
        return case.group_size in (24, 128, case.K) or (case.group_size in (32, 48, 96) and case.order == "perm")
    return case.bits == 3 and case.group_size in (24, 32, 128) and case.order == "perm"


def is_quick_product(algorithm: str, arch: int, case: Case) -> bool:
    if arch == 75:
        return algorithm == "mma" and case.bits == 4 and is_quick(case)
    if arch == 80 and case.bits in (2, 8) and case.order == "perm":
        return (case.group_size == 128 and algorithm in ("scalar", "mma")) or (
            case.group_size == 32 and algorithm == "mma" and case.bits == 2
        )
    return arch == 80 and is_quick(case)


EVERY_WEIGHT = [
    on(arch, case, quick=case == EVERYWHERE or (arch == 80 and is_quick(case))) for arch in ARCHS for case in ALL_CASES
]
EVERY_WIDTH = [on(arch, bits, quick=arch == 80 and bits in (3, 4)) for arch in ARCHS for bits in SHAPES]
EVERY_PRODUCT = [
    on(arch, algorithm, case, quick=case == EVERYWHERE or is_quick_product(algorithm, arch, case))
    for arch in ARCHS
    for algorithm in ALGORITHMS
    for case in ALL_CASES
]


def activations(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


def check_gemm(ops: emulated.EmulatedOps, algorithm: str, weight: Weight, M: int, dtype: torch.dtype) -> torch.Tensor:
    x = activations(M, weight.case.K, dtype)
    out: torch.Tensor = ops.gptq_gemm(x, *weight.args)
    assert any(algorithm in call["kernel"] for call in ops.calls if call["call"] == "launch") or algorithm == "dense"
    assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, dtype))
    return out


@pytest.mark.parametrize(("ops", "algorithm", "case"), EVERY_PRODUCT, indirect=["ops"])
def test_gemm_is_within_the_bound(
    ops: emulated.EmulatedOps, algorithm: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    weight = build(case)
    for dtype in DTYPES:
        if not can(algorithm, ops.arch, case, dtype):
            with pytest.raises(ValueError, match=f"EXLLAMA_OPS_CUDA_ALGORITHM={algorithm} cannot"):
                ops.gptq_gemm(activations(1, case.K, dtype), *weight.args)
            continue
        for M, truncates in itertools.product((1, 11), (False, True) if algorithm == "mma" else (False,)):
            ops.device.set_mma(truncates=truncates)
            check_gemm(ops, algorithm, weight, M, dtype)


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_an_order_of_rows_is_that_of_the_columns_of_x(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether a kernel looks up each column of x, or a kernel before it gathers all."""
    for group_size, algorithm, M in itertools.product((32, 128), ("scalar", "mma", "tiled"), (4, 5)):
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        weight = build(Case(bits, *SHAPES[bits], group_size, "perm"))
        in_order = replace(weight, row_order=weight.row_order[:0])
        x = activations(M, weight.case.K, torch.float16)
        out = ops.gptq_gemm(x, *weight.args)
        gathers = ["gather_columns" in call["kernel"] for call in ops.calls]
        assert gathers == [M == 5 or algorithm == "tiled"] + [False] * (len(gathers) - 1)
        assert torch.equal(out, ops.gptq_gemm(x[:, weight.row_order.long()].contiguous(), *in_order.args))


def check_parts(ops: emulated.EmulatedOps, algorithm: str, parts: list[Weight], M: int) -> list[str]:
    """Every part of a product of several; returns the kernels that were launched."""
    x = activations(M, parts[0].case.K, torch.float16)
    out = ops.gptq_gemm_multi(x, *multi_args(parts))
    for part, result in zip(parts, out.split([part.case.N for part in parts], 1), strict=True):
        assert_within_bound(result.contiguous(), x, part.dense, bounds.gemm_error(algorithm, part, x.dtype))
    return [call["kernel"] for call in ops.calls if call["call"] == "launch"]


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_parts_are_within_the_bound(ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that fill no tile, or several; more parts than a launch has; 11 rows lie apart in the result."""
    K, N = SHAPES[bits]
    for order, columns in itertools.product(("perm", "raw"), ([N], [N, 160], [32, N, 160], [N, *[32] * 7, 160])):
        parts = build_parts(Case(bits, K, N, 128, order, shuffled=order == "perm"), columns)
        for algorithm, M in itertools.product(ALGORITHMS, (1, 11)):
            if can(algorithm, ops.arch, parts[0].case, torch.float16):
                monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
                check_parts(ops, algorithm, parts, M)


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_dense_goes_by_chunks_of_columns_and_of_rows(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MiB holds 64 columns of so many rows of W, of whatever part they are, and 64 rows of so long a result."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    parts = build_parts(Case(4, 8200, 136, 128), [136, 72])
    assert ["dequantize" in kernel for kernel in check_parts(ops, "dense", parts, 2)] == [True] * 2
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_DENSE_MIB", "1")
    emulated.float32_products.clear()
    assert ["dequantize" in kernel for kernel in check_parts(ops, "dense", parts, 2)] == [True] * (3 + 2)
    assert emulated.float32_products == [(2, 64), (2, 64), (2, 8), (2, 64), (2, 8)]
    emulated.float32_products.clear()
    check_gemm(ops, "dense", build(Case(4, 32, 4352, 32)), 70, torch.float16)
    assert emulated.float32_products == [(64, 4352), (6, 4352)]


@pytest.fixture
def torch_settings() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_dense_is_left_out_where_torch_refuses_its_blas(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch, torch_settings: None
) -> None:
    """The settings of torch are those of the call, and CUBLAS_WORKSPACE_CONFIG is that of torch's first use."""
    weight = build(EVERYWHERE)

    message = "gptq_gemm: EXLLAMA_OPS_CUDA_ALGORITHM=dense cannot compute these arguments on this GPU, as torch is set"

    def takes(dtype: torch.dtype) -> bool:
        try:
            check_gemm(ops, "dense", weight, 1, dtype)
        except ValueError as error:
            if str(error) != message:
                raise
            return False
        return True

    def taken() -> tuple[bool, bool]:
        return takes(torch.float16), takes(torch.bfloat16)

    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    assert taken() == (True, True)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    assert taken() == (False, True)
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for config, is_taken in ((None, False), ("", False), (":8:8", False), (":16:8", True)):
        if config is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        else:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
        assert taken() == (is_taken, is_taken), config
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    assert taken() == (True, True)


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_blas_writes_the_result_of_dense_where_it_rounds_once(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch, torch_settings: None
) -> None:
    """That is where torch must not add up the splits of a sum in 16 bits; each dtype has a setting of its own."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    parts = build_parts(EVERYWHERE, [72, 40])
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for allowed, float32_results in ((True, 2), (False, 0)):
            setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", allowed)
            emulated.float32_products.clear()
            x = activations(3, EVERYWHERE.K, dtype)
            out = ops.gptq_gemm_multi(x, *multi_args(parts))
            assert len(emulated.float32_products) == float32_results
            for part, result in zip(parts, out.split([72, 40], 1), strict=True):
                assert_within_bound(result.contiguous(), x, part.dense, bounds.gemm_error("dense", part, dtype))


@pytest.mark.parametrize(("ops", "case"), EVERY_WEIGHT, indirect=["ops"])
def test_dequantize_is_exact_up_to_one_rounding(ops: emulated.EmulatedOps, case: Case) -> None:
    weight = build(case)
    assert torch.equal(ops.gptq_dequantize(*weight.args), weight.dense.float().to(case.scales_dtype))


def check_dx(ops: emulated.EmulatedOps, weight: Weight, M: int, dtype: torch.dtype = torch.float16) -> str:
    """Returns its algorithm."""
    grad = activations(M, weight.case.N, dtype)
    dx = ops.gptq_gemm_dx(grad, *weight.args)
    algorithm = dx_algorithm(ops)
    assert_within_bound(dx, grad, weight.dense.t(), bounds.dx_error(weight.case.N, algorithm))
    return algorithm


def dx_algorithm(ops: emulated.EmulatedOps) -> str:
    """What the last call went by."""
    return "dense" if any("add_limb" in call.get("kernel", "") for call in ops.calls) else "tiled"


@pytest.mark.parametrize(("ops", "case"), EVERY_WEIGHT, indirect=["ops"])
def test_dx_is_within_the_bound(ops: emulated.EmulatedOps, case: Case) -> None:
    weight = build(case)
    for dtype in DTYPES:
        check_dx(ops, weight, 5, dtype)


# dtypes of a gradient and of scales, by which W is a sum of numbers in the first one.
LIMBS = [(torch.float16, torch.float16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_dx_of_a_dense_w_is_within_the_bound(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    for (order, shuffled), (dtype, scales_dtype) in itertools.product(ORDERS, LIMBS):
        weight = build(Case(bits, *SHAPES[bits], 128, order, shuffled, scales_dtype=scales_dtype))
        can_be = dtype == torch.float16 or ops.arch >= 80  # BLAS refuses bfloat16
        assert check_dx(ops, weight, 3, dtype) == ("dense" if can_be else "tiled")


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_dx_is_tiled_where_w_is_no_sum_of_16_bits(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    for dtype, scales_dtype in set(itertools.product(DTYPES, DTYPES)) - set(LIMBS):
        assert check_dx(ops, build(Case(4, 32, 16, 32, scales_dtype=scales_dtype)), 2, dtype) == "tiled"


@pytest.mark.parametrize(("ops", "bits"), [on(80, bits, quick=True) for bits in SHAPES], indirect=["ops"])
def test_one_hot_dx_of_a_dense_w_returns_its_columns(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, whatever the scales are: the numbers of 16 bits add up to W. An infinite gradient meets no zero of them.

    The gradient's one is 2**-9 in float16, which has most products in its range.
    """
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    rng = torch.Generator().manual_seed(bits)
    for (order, group_size), (dtype, scales_dtype) in itertools.product((("perm", 32), ("sorted", 24)), LIMBS):
        weight = build(Case(bits, 96, SHAPES[bits][1], group_size, order, scales_dtype=scales_dtype))
        # Below the limit of |W|, beyond which a bfloat16 may be inf.
        weight.scales.copy_(
            extremes(tuple(weight.scales.shape), scales_dtype, rng).double().clamp(-(2.0**118), 2.0**118)
        )
        W, one = weight.dense.t(), 2.0**-9 if dtype == torch.float16 else 1.0
        grad = torch.eye(len(W), dtype=dtype) * one
        expected = (W * one).float().to(dtype)
        dx = ops.gptq_gemm_dx(grad, *weight.args)
        assert dx_algorithm(ops) == "dense"
        assert torch.equal(dx, expected)
        grad[2, 2] = torch.inf
        dx = ops.gptq_gemm_dx(grad, *weight.args)[2]
        assert torch.equal(dx.isnan(), W[2] == 0)
        assert torch.equal(dx.nan_to_num(0.0, 1.0, -1.0), W[2].sign().to(dtype))


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_dx_of_a_dense_w_goes_by_chunks(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB holds both numbers of 128 rows of so many columns of W, and both products of 64 rows of so long a dx."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_DENSE_MIB", "1")
    for order, (K, N), M, products in (
        ("perm", (296, 2048), 3, [(3, 128)] * 4 + [(3, 40)] * 2),
        ("sorted", (2080, 8), 70, [(64, 2080)] * 2 + [(6, 2080)] * 2),
    ):
        emulated.float32_products.clear()
        assert check_dx(ops, build(Case(4, K, N, 8, order)), M) == "dense"
        assert emulated.float32_products == products


@pytest.mark.parametrize(("ops", "bits"), [on(80, bits, quick=bits == 4) for bits in SHAPES], indirect=["ops"])
def test_a_filled_weight_is_multiplied_by_every_algorithm(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x has fewer columns than the words have rows; where inf meets a row that only fills its group, it meets 0."""
    K = 7 * BLOCK_VALUES[bits]
    parts = build_parts(Case(bits, K, 96, 32, "filled"), [96, 32])
    weight = parts[0]
    assert weight.rows > K
    x = torch.zeros(3, K, dtype=torch.float16)
    x[0, 0], x[1, K - 1], x[2, 7] = torch.inf, torch.inf, 1
    for algorithm in ALGORITHMS:
        if not can(algorithm, ops.arch, weight.case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        for dtype in DTYPES:
            if can(algorithm, ops.arch, weight.case, dtype):
                check_gemm(ops, algorithm, weight, 9, dtype)
        check_parts(ops, algorithm, parts, 1)
        infinite, also, row = ops.gptq_gemm(x, *weight.args)
        for out, k in (infinite, 0), (also, K - 1):
            assert torch.equal(out.isnan(), weight.dense[k] == 0)
        torch.testing.assert_close(row.double(), weight.dense[7], rtol=1e-3, atol=0)
    check_dx(ops, weight, 5)
    for scales_dtype in DTYPES:
        weight = build(replace(weight.case, scales_dtype=scales_dtype))
        assert torch.equal(ops.gptq_dequantize(*weight.args), weight.dense.float().to(scales_dtype))


@pytest.mark.parametrize(
    ("ops", "at", "wrong"), [on(80, at, wrong, quick=True) for at, wrong in ((3, -2), (3, 552), (-1, -1), (-1, 10**6))],
    indirect=["ops"],
)  # fmt: skip
def test_a_wrong_entry_of_a_filled_order_stops_the_kernel(ops: emulated.EmulatedOps, at: int, wrong: int) -> None:
    weight = build(Case(4, *SHAPES[4], 32, "filled"))
    weight.row_order[at] = wrong
    x = activations(1, weight.case.K, torch.float16)
    op, first = (ops.gptq_gemm, [x]) if at >= 0 else (ops.gptq_dequantize, [])
    with pytest.raises(EmulationError, match="trap"):
        op(*first, *weight.args)


@pytest.mark.parametrize(
    ("ops", "bits", "order", "truncates"),
    [
        on(arch, bits, order, truncates, quick=arch == 80 and bits == 4 and (order == "random") == truncates)
        for arch, bits, order, truncates in itertools.product(ARCHS, SHAPES, ["descending", "random"], [False, True])
    ],
    indirect=["ops"],
)
def test_many_tokens_in_any_order_of_blocks(
    ops: emulated.EmulatedOps, bits: int, order: str, truncates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    K, N = SHAPES[bits]
    weight = build(Case(bits, K, N, 128, "perm"))
    ops.device.set_order(order, seed=bits)
    ops.device.set_mma(truncates=truncates)
    for algorithm in ALGORITHMS:
        if not can(algorithm, ops.arch, weight.case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        for M in (33, 300):
            check_gemm(ops, algorithm, weight, M, torch.float16)
        check_parts(ops, algorithm, build_parts(weight.case, [N, 160]), 33)


@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_the_other_ops_in_any_order_of_blocks(ops: emulated.EmulatedOps, bits: int, order: str) -> None:
    weight = build(Case(bits, *SHAPES[bits], 128, "perm"))
    ops.device.set_order(order, seed=bits)
    assert torch.equal(ops.gptq_dequantize(*weight.args), weight.dense.float().half())
    check_dx(ops, weight, 200)
    checkpoint = build(replace(weight.case, shuffled=False)).qweight
    words = checkpoint.clone()
    ops.gptq_shuffle(words, weight.row_order, bits)
    assert torch.equal(words, weight.qweight)
    assert torch.equal(ops.gptq_unshuffle(words, weight.row_order, bits), checkpoint)


@pytest.mark.parametrize("scales_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_scales_of_any_dtype_are_taken_exactly(
    ops: emulated.EmulatedOps, bits: int, scales_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = build(Case(bits, *SHAPES[bits], 128, scales_dtype=scales_dtype))
    assert torch.equal(ops.gptq_dequantize(*weight.args), weight.dense.float().to(scales_dtype))
    for algorithm in ALGORITHMS:
        if not can(algorithm, ops.arch, weight.case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        check_gemm(ops, algorithm, weight, 3, torch.float16)


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_dx_of_many_tokens_is_within_the_bound(ops: emulated.EmulatedOps, bits: int) -> None:
    weight = build(Case(bits, *SHAPES[bits], 128, "perm"))
    for M in (64, 130):
        check_dx(ops, weight, M)


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_nan_and_inf_stay_in_their_row(ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = build(Case(bits, *SHAPES[bits], 128, "perm"))
    x = activations(4, weight.case.K, torch.float16)
    for value, algorithm in itertools.product((float("nan"), float("inf"), float("-inf")), ALGORITHMS):
        if not can(algorithm, ops.arch, weight.case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        x[2, 5] = value
        out = ops.gptq_gemm(x, *weight.args)
        expected = (x[2].double() @ weight.dense).half()
        assert out[[0, 1, 3]].isfinite().all()
        assert torch.equal(out[2].isnan(), expected.isnan())
        assert torch.equal(out[2].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_nothing_overflows_before_the_final_rounding(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of one sign, whose unscaled float16 partial sums (the original's) are inf."""
    K, N = SHAPES[bits]
    weight = build(Case(bits, K, N, 128), q=torch.full((K, N), 2**bits - 1))
    weight.scales.fill_(2.0**-14)
    x = torch.full((2, K), 4000.0 if bits in (3, 8) else 30000.0, dtype=torch.float16)
    for algorithm in ALGORITHMS:
        if not can(algorithm, ops.arch, weight.case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        out = ops.gptq_gemm(x, *weight.args)
        assert out.isfinite().all()
        assert_within_bound(out, x, weight.dense, bounds.gemm_error(algorithm, weight, torch.float16))


@pytest.mark.parametrize(
    ("ops", "algorithm", "case"),
    [
        on(arch, algorithm, case, quick=arch == 80 and is_quick(case))
        for arch, algorithm in itertools.product(ARCHS, ALGORITHMS)
        for bits, (order, shuffled) in itertools.product(SHAPES, ORDERS)
        if can(algorithm, arch, case := Case(bits, *SHAPES[bits], 128, order, shuffled), torch.float16)
    ],
    indirect=["ops"],
)
def test_one_hot_x_returns_rows_of_dequantize(
    ops: emulated.EmulatedOps, algorithm: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random product hides one misplaced value; this cannot."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    weight = build(case)
    eye = torch.eye(case.K, dtype=torch.float16)
    assert torch.equal(ops.gptq_gemm(eye, *weight.args), ops.gptq_dequantize(*weight.args))


@pytest.mark.parametrize(("ops", "bits"), EVERY_WIDTH, indirect=["ops"])
def test_outliers_where_q_equals_z_leave_no_trace(
    ops: emulated.EmulatedOps, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(bits, *SHAPES[bits], 128)
    plain = build(case)
    q = plain.q.clone()
    q[3] = plain.z[plain.groups[3]]
    weight = build(case, q=q)
    x = activations(2, case.K, torch.float16)
    with_outlier = x.clone()
    with_outlier[:, 3] = 30000.0
    x[:, 3] = 0.0
    for algorithm in ("scalar", "mma", "pipelined", "tiled"):
        if not can(algorithm, ops.arch, case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        assert torch.equal(ops.gptq_gemm(with_outlier, *weight.args), ops.gptq_gemm(x, *weight.args))


@pytest.mark.parametrize(
    ("ops", "algorithm", "bits", "group_size", "dtype"),
    [
        on(
            arch,
            algorithm,
            bits,
            group_size,
            dtype,
            quick=arch == 80 and bits in (3, 4) and group_size != 32 and dtype == torch.float16,
        )
        for arch, bits, dtype in itertools.product(ARCHS, SHAPES, (torch.float16, torch.bfloat16))
        for algorithm, group_size in (("scalar", 24), ("mma", 128), ("mma", 32))
        if can(algorithm, arch, Case(bits, *SHAPES[bits], group_size), dtype)
    ],
    indirect=["ops"],
)
def test_batch_invariant_rows_do_not_depend_on_M(
    ops: emulated.EmulatedOps, algorithm: str, bits: int, group_size: int, dtype: torch.dtype
) -> None:
    case = Case(bits, *SHAPES[bits], group_size)
    parts = build_parts(case, [case.N, 32])
    x = activations(40, case.K, dtype)
    ops.set_batch_invariant(True)
    try:
        for product, args in ((ops.gptq_gemm, parts[0].args), (ops.gptq_gemm_multi, multi_args(parts))):
            whole = product(x, *args)
            assert any(algorithm in call["kernel"] for call in ops.calls)
            for rows in (x[:1], x[1:4], x[4:15]):
                start = int((rows.data_ptr() - x.data_ptr()) / x.stride(0) / x.element_size())
                assert torch.equal(product(rows, *args), whole[start : start + len(rows)])
    finally:
        ops.set_batch_invariant(False)


SHUFFLE_CASES = [
    Case(bits, BLOCK_VALUES[bits] * blocks, BLOCK_VALUES[bits] * 3, 8, order)
    for bits in BLOCK_VALUES
    for blocks in (1, 5, 13)
    for order in ("sorted", "perm")
]


@pytest.mark.parametrize(
    ("ops", "case"),
    [on(arch, case, quick=arch == 80) for arch in ARCHS for case in SHUFFLE_CASES],
    indirect=["ops"],
)
def test_shuffle_and_unshuffle_bit_for_bit(ops: emulated.EmulatedOps, case: Case) -> None:
    shuffled = build(case)
    checkpoint = build(Case(**{**vars(case), "shuffled": False})).qweight
    words = checkpoint.clone()
    ops.gptq_shuffle(words, shuffled.row_order, case.bits)
    assert torch.equal(words, shuffled.qweight)
    assert torch.equal(ops.gptq_unshuffle(words, shuffled.row_order, case.bits), checkpoint)


EVERY_ARCH = [on(arch, quick=arch == 80) for arch in ARCHS]


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_what_a_permutation_with_duplicates_leaves_out_is_nan(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(False)  # which fills all memory with NaN
    weight = build(Case(4, *SHAPES[4], 128, "perm"))
    missing, weight.row_order[3] = int(weight.row_order[3]), weight.row_order[5]
    others = torch.arange(weight.case.K) != missing
    W = ops.gptq_dequantize(*weight.args)
    assert W[missing].isnan().all()
    assert W[others].isfinite().all()
    for dtype in DTYPES:
        dx = ops.gptq_gemm_dx(activations(2, weight.case.N, dtype), *weight.args)
        assert dx[:, missing].isnan().all()
        assert dx[:, others].isfinite().all()
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "dense")  # by a dense W
    assert ops.gptq_gemm(activations(1, weight.case.K, torch.float16), *weight.args).isnan().all()
    with pytest.raises(EmulationError, match=r"^trap at line"):
        ops.gptq_unshuffle(weight.qweight, weight.row_order, 4)


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
@pytest.mark.parametrize("algorithm", ["scalar", "mma"])
def test_sums_of_a_split_K(ops: emulated.EmulatedOps, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    check_gemm(ops, algorithm, build(Case(4, 3144, 40, 128, "perm")), 3, torch.float16)
    (launch,) = ops.calls
    assert launch["grid"][1] > 1


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
@pytest.mark.parametrize("algorithm", ["scalar", "mma", "tiled"])
def test_parts_are_one_launch(ops: emulated.EmulatedOps, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up their splits too; nine are two, for a launch has eight."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    for columns, launches in (([40], 1), ([40, 72, 64], 1), ([40, *[8] * 8], 2)):
        kernels = check_parts(ops, algorithm, build_parts(Case(4, 3144, 40, 128), columns), 3)
        assert [algorithm in kernel for kernel in kernels] == [True] * launches
        assert algorithm == "tiled" or all(call["grid"][1] > 1 for call in ops.calls)


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_one_part_at_any_address_is_enough_for_scalar(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor-core kernel reads 16 bytes at a time of every part; the emulator stops at such a read elsewhere."""
    parts = build_parts(Case(4, *SHAPES[4], 128, "perm"), [64, 32])
    words = parts[1].qweight
    parts[1].qweight.set_(torch.cat([words.new_zeros(1), words.flatten()])[1:].view_as(words))
    assert parts[1].qweight.data_ptr() % 16
    assert "scalar" in check_parts(ops, "scalar", parts, 3)[0]
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "mma")
    with pytest.raises(ValueError, match="EXLLAMA_OPS_CUDA_ALGORITHM=mma cannot"):
        check_parts(ops, "mma", parts, 3)


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_scales_of_parts_have_dtypes_of_their_own(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [build(Case(4, *SHAPES[4], 128, "perm", scales_dtype=dtype)) for dtype in DTYPES]
    for algorithm in ALGORITHMS:
        if not can(algorithm, ops.arch, parts[0].case, torch.float16):
            continue
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        check_parts(ops, algorithm, parts, 3)


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_call_can_be_captured_in_a_graph(
    ops: emulated.EmulatedOps, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches and copies on the current stream, and nothing else: the emulator refuses calls that sync or allocate."""
    weight = build(Case(4, *SHAPES[4], 128, "perm"))
    if not can(algorithm, ops.arch, weight.case, torch.float16):
        pytest.skip(f"no {algorithm} on sm_{ops.arch}")
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
    stream = 0x5EED
    ops.device.set_stream(stream, is_capturing=True)
    try:
        x, grad = activations(5, weight.case.K, torch.float16), activations(5, weight.case.N, torch.float16)
        for call in (
            lambda: ops.gptq_gemm(x, *weight.args),
            lambda: ops.gptq_gemm_multi(x, *multi_args([weight, weight])),
            lambda: ops.gptq_gemm_dx(grad, *weight.args),
            lambda: ops.gptq_dequantize(*weight.args),
            lambda: ops.gptq_unshuffle(weight.qweight, weight.row_order, 4),
            lambda: ops.gptq_shuffle(weight.qweight.clone(), weight.row_order, 4),
        ):
            call()
            assert ops.calls
            assert {recorded["call"] for recorded in ops.calls} <= {"launch", "memcpy", "memset"}
            assert {recorded["stream"] for recorded in ops.calls} == {stream}
    finally:
        ops.device.set_stream(0)


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_a_replay_computes_with_the_new_data(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph replays: the same launches, on what then lies at the same addresses."""
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "mma")  # which does not split these few rows of W
    weight, other = (build(Case(4, *SHAPES[4], 128, "perm", seed=seed)) for seed in (0, 1))
    x = activations(3, weight.case.K, torch.float16)
    ops.read_environment()
    with ops.device.record() as recording:
        out = ops.unchecked.gptq_gemm(x, *weight.args)
        dense = ops.unchecked.gptq_dequantize(*weight.args)
    # No workspace, which is gone by now; the memory of the second result is filled with NaN before.
    assert [call["call"] for call in recording.calls] == ["launch", "memset", "launch"]
    x.mul_(-3)
    for name in ("qweight", "qzeros", "scales", "row_order"):
        getattr(weight, name).copy_(getattr(other, name))
    ops.device.replay(recording)
    assert torch.equal(dense, other.dense.to(torch.float16))
    assert_within_bound(out, x, other.dense, bounds.gemm_error("mma", weight, torch.float16))


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_work_is_on_the_device_of_the_tensors_and_the_current_device_stays(ops: emulated.EmulatedOps) -> None:
    weight = build(Case(4, *SHAPES[4], 128, "perm"))
    x, grad = activations(3, weight.case.K, torch.float16), activations(3, weight.case.N, torch.float16)
    ops.device.set_current_device(1)
    for op, *args in (
        (ops.gptq_gemm, x, *weight.args),
        (ops.gptq_gemm_multi, x, *multi_args([weight, weight])),
        (ops.gptq_gemm_dx, grad, *weight.args),
        (ops.gptq_dequantize, *weight.args),
        (ops.gptq_unshuffle, weight.qweight, weight.row_order, 4),
        (ops.gptq_shuffle, weight.qweight.clone(), weight.row_order, 4),
    ):
        op(*args)
        assert {call["device"] for call in ops.calls} == {0}
        assert ops.device.current_device == 1


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_an_op_makes_no_context_on_another_device(ops: emulated.EmulatedOps) -> None:
    """A context takes half a gigabyte of a GPU that the process may never use."""
    weight = build(EVERYWHERE)
    ops.device.begin_on_device(1)
    ops.gptq_gemm(activations(3, weight.case.K, torch.float16), *weight.args)
    assert ops.device.devices_with_context == {0}
    assert ops.device.current_device == 1


@pytest.mark.parametrize("ops", EVERY_ARCH, indirect=True)
def test_the_current_device_stays_where_an_op_fails(ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = build(Case(4, *SHAPES[4], 128))
    ops.device.set_current_device(1)
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", "fast")
    message = "gptq_gemm: EXLLAMA_OPS_CUDA_ALGORITHM must be one of mma, scalar, pipelined, tiled, dense; got fast"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ops.gptq_gemm(activations(1, weight.case.K, torch.float16), *weight.args)
    assert ops.device.current_device == 1


@pytest.mark.parametrize("given", ["0", "-3", "64 MiB", "many", "99999999999999999999"])
@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_a_size_of_a_dense_w_that_is_none_is_refused(
    ops: emulated.EmulatedOps, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = build(Case(4, *SHAPES[4], 128))
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_DENSE_MIB", given)
    message = f"gptq_gemm: EXLLAMA_OPS_CUDA_DENSE_MIB must be a number of MiB from 1 to 1048576; got {given}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ops.gptq_gemm(activations(1, weight.case.K, torch.float16), *weight.args)


@pytest.mark.parametrize("ops", [on(80, quick=True)], indirect=True)
def test_the_log_has_a_line_for_every_choice(
    ops: emulated.EmulatedOps, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LOG", "1")
    K, N = SHAPES[4]
    for order, shuffled, dtype, algorithm, said in (
        ("perm", True, torch.float16, "mma", "perm sm_80: mma rows=8 split_k=1 chunk=0"),
        ("sorted", True, torch.bfloat16, "scalar", "shuffled sm_80: scalar rows=1 split_k=1 chunk=0"),
        ("sorted", False, torch.float32, "tiled", "unshuffled sm_80: tiled rows=64 split_k=1 chunk=0"),
        ("raw", False, torch.float16, "dense", f"g_idx sm_80: dense rows=3 split_k=1 chunk={N}"),
    ):
        monkeypatch.setenv("EXLLAMA_OPS_CUDA_ALGORITHM", algorithm)
        ops.gptq_gemm(activations(3, K, dtype), *build(Case(4, K, N, 128, order, shuffled)).args)
        x = str(dtype).removeprefix("torch.")
        expected = f"exllama_ops: gptq_gemm M=3 K={K} N={N} bits=4 group_size=128 x={x} scales=float16 {said}\n"
        assert capfd.readouterr().err == expected
    monkeypatch.setenv("EXLLAMA_OPS_CUDA_LOG", "0")
    ops.gptq_gemm(activations(3, K, torch.float16), *build(Case(4, K, N, 128)).args)
    assert capfd.readouterr().err == ""


BATCH_INVARIANT = """
import sys
from pathlib import Path

import exllama_ops
from exllama_ops.backends.cuda import BACKEND
from exllama_ops.backends.cuda.library import CudaLibrary

library = CudaLibrary(Path(sys.argv[1]))
BACKEND.prepare(library)
said = [library.batch_invariant()]
for enabled in (False, True):
    exllama_ops.set_batch_invariant(enabled)
    said.append(library.batch_invariant())
print(*said, BACKEND.settings(library))
"""


def test_batch_invariance_reaches_the_library() -> None:
    """By the environment, when the library is loaded, and by the function from then on."""
    environment = {**os.environ, "EXLLAMA_OPS_BATCH_INVARIANT": "1"}
    command = [sys.executable, "-c", BATCH_INVARIANT, str(emulated.library(80))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "True False True , batch-invariant\n"
