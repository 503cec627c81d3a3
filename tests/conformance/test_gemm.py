"""The conformance matrix: backend x bits x group size x row order x zero format x dtype x M x shape.

What a test of gptq_gemm or gptq_gemm_multi finds may depend on the CPU's matmul precision, so those run at each.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from conformance.backends import BackendUnderTest, at_every_precision, at_every_precision_of
from conformance.weights import DTYPES, Case, Weight, build, build_parts, multi_args
from exllama_ops import backends
from exllama_ops.testing.bounds import assert_within_bound

TOKENS = (0, 1, 7, 8, 9, 33)
MANY_TOKENS = (64, 257)
ORDERS = [("sorted", True), ("perm", True), ("sorted", False), ("raw", False)]
# (K, N) per width: multiples of the width's block, as odd as the format allows.
SHAPES = {2: (480, 48), 3: (480, 96), 4: (488, 24), 8: (484, 20)}
SMALL_SHAPES = {2: (48, 80), 3: (96, 32), 4: (40, 72), 8: (36, 44)}
# Activations whose unscaled sums leave the range of float16, and whose scaled sums do not.
OVERFLOWING = {2: 30000.0, 3: 4000.0, 4: 30000.0, 8: 30000.0}


def group_sizes(K: int) -> list[int]:
    """Of any kind: below, at and above words and tiles, all of K, and (where it does not divide) a partial last one."""
    return [8, 16, 24, 48, 96, 128, 160, K]


def gemm_cases() -> list[Case]:
    return [
        Case(bits, K, N, size, order, shuffled, v2)
        for bits, (K, N) in SHAPES.items()
        for size in group_sizes(K)
        for order, shuffled in ORDERS
        for v2 in (True, False)
    ]


@functools.lru_cache(maxsize=4)
def shared(case: Case) -> Weight:
    """One weight for all backends, whose tests of a case follow one another. No test may write to it."""
    return build(case)


def activations(M: int, K: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_gemm(backend: BackendUnderTest, weight: Weight, M: int, dtype: torch.dtype) -> None:
    x = activations(M, weight.case.K, dtype)
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args)
    assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


def check_dx(backend: BackendUnderTest, weight: Weight, M: int, dtype: torch.dtype) -> None:
    grad = activations(M, weight.case.N, dtype)
    dx = backend.ops.gptq_gemm_dx(grad.to(backend.device), *weight.to(backend.device).args)
    assert_within_bound(dx, grad, weight.dense.t(), *backend.dx_error(weight.case.N))


@at_every_precision_of(gemm_cases())
def test_gemm_is_within_the_bound(backend: BackendUnderTest, case: Case, request: pytest.FixtureRequest) -> None:
    products = list(itertools.product(DTYPES, TOKENS))
    for dtype, M in backend.thinned(products, case, request.config.getoption("slow")):
        check_gemm(backend, shared(case), M, dtype)


@pytest.mark.parametrize("case", gemm_cases(), ids=str)
def test_dx_is_within_the_bound(backend: BackendUnderTest, case: Case, request: pytest.FixtureRequest) -> None:
    products = list(itertools.product(DTYPES, TOKENS))
    for dtype, M in backend.thinned(products, case, request.config.getoption("slow")):
        check_dx(backend, shared(case), M, dtype)


MANY_TOKENS_CASES = [Case(bits, *SMALL_SHAPES[bits], 16, *order) for bits in SMALL_SHAPES for order in ORDERS]


@at_every_precision_of(MANY_TOKENS_CASES)
def test_gemm_is_within_the_bound_for_many_tokens(
    backend: BackendUnderTest, case: Case, request: pytest.FixtureRequest
) -> None:
    products = list(itertools.product(DTYPES, MANY_TOKENS))
    for dtype, M in backend.thinned(products, case, request.config.getoption("slow")):
        check_gemm(backend, shared(case), M, dtype)


@pytest.mark.parametrize("case", MANY_TOKENS_CASES, ids=str)
def test_dx_is_within_the_bound_for_many_tokens(
    backend: BackendUnderTest, case: Case, request: pytest.FixtureRequest
) -> None:
    products = list(itertools.product(DTYPES, MANY_TOKENS))
    for dtype, M in backend.thinned(products, case, request.config.getoption("slow")):
        check_dx(backend, shared(case), M, dtype)


@at_every_precision
@pytest.mark.parametrize("scales_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_gemm_takes_scales_of_any_dtype_exactly(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, scales_dtype: torch.dtype
) -> None:
    check_gemm(backend, build(Case(bits, *SMALL_SHAPES[bits], 24, scales_dtype=scales_dtype)), 9, dtype)


@pytest.mark.parametrize("scales_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_dx_takes_scales_of_any_dtype_exactly(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype, scales_dtype: torch.dtype
) -> None:
    check_dx(backend, build(Case(bits, *SMALL_SHAPES[bits], 24, scales_dtype=scales_dtype)), 9, dtype)


@pytest.mark.parametrize("case", gemm_cases(), ids=str)
def test_dequantize_is_exact_up_to_one_rounding(backend: BackendUnderTest, case: Case) -> None:
    weight = build(case)
    out = backend.ops.gptq_dequantize(*weight.to(backend.device).args)
    # float64 -> half goes through float32 in torch; the products are exact there, so this rounds once.
    assert torch.equal(out.cpu(), weight.dense.float().to(case.scales_dtype))
    assert out.is_contiguous()


@pytest.mark.parametrize("scales_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_dequantize_rounds_once_to_the_dtype_of_the_scales(
    backend: BackendUnderTest, bits: int, scales_dtype: torch.dtype
) -> None:
    weight = build(Case(bits, *SMALL_SHAPES[bits], 24, "perm", scales_dtype=scales_dtype))
    out = backend.ops.gptq_dequantize(*weight.to(backend.device).args)
    assert torch.equal(out.cpu(), weight.dense.float().to(scales_dtype))


@at_every_precision_of(case for case in gemm_cases() if case.group_size in (24, 128))
def test_one_hot_x_returns_rows_of_dequantize(backend: BackendUnderTest, case: Case) -> None:
    """A random product hides one misplaced value; this cannot."""
    weight = build(case).to(backend.device)
    W = backend.ops.gptq_dequantize(*weight.args)
    eye = torch.eye(case.K, dtype=case.scales_dtype, device=backend.device)
    assert torch.equal(backend.ops.gptq_gemm(eye, *weight.args), W)


@pytest.mark.parametrize("case", [c for c in gemm_cases() if c.group_size in (24, 128)], ids=str)
def test_one_hot_grad_returns_columns_of_dequantize(backend: BackendUnderTest, case: Case) -> None:
    weight = build(case).to(backend.device)
    W = backend.ops.gptq_dequantize(*weight.args)
    eye = torch.eye(case.N, dtype=case.scales_dtype, device=backend.device)
    assert torch.equal(backend.ops.gptq_gemm_dx(eye, *weight.args), W.t())


@at_every_precision_of(Case(bits, *SMALL_SHAPES[bits], 16, *order) for order in ORDERS for bits in SMALL_SHAPES)
def test_one_hot_weight_columns_return_columns_of_x(backend: BackendUnderTest, case: Case) -> None:
    K, N, bits = case.K, case.N, case.bits
    z = build(case)
    q = z.z[z.groups].clamp(max=2**bits - 1)
    row_of_column = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(2))
    up = q[row_of_column, torch.arange(N)] < 2**bits - 1
    q[row_of_column, torch.arange(N)] += torch.where(up, 1, -1)
    weight = build(case, q=q)
    weight.scales.fill_(1.0)
    x = activations(5, K, torch.float16)
    expected = x[:, row_of_column] * torch.where(up, 1, -1).half()
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args)
    if backend.sums_are_exact:
        assert torch.equal(out.cpu(), expected)
    else:
        assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


@at_every_precision
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_outliers_where_q_equals_z_leave_no_trace(backend: BackendUnderTest, bits: int) -> None:
    """An activation of 30000 times an exact zero must not cost the other terms their precision."""
    K, N = SMALL_SHAPES[bits]
    case = Case(bits, K, N, 16)
    plain = build(case)
    q = plain.q.clone()
    q[3] = plain.z[plain.groups[3]]
    weight = build(case, q=q)
    x = activations(9, K, torch.float16)
    x[:, 3] = 30000.0
    without = x.clone()
    without[:, 3] = 0
    args = weight.to(backend.device).args
    out = backend.ops.gptq_gemm(x.to(backend.device), *args)
    if backend.sums_are_exact:
        assert torch.equal(out, backend.ops.gptq_gemm(without.to(backend.device), *args))
    elif backend.precision == "high":
        # An element-wise bound has no part of the outlier, whose weight is zero.
        assert_within_bound(out, without, weight.dense, 2.0**-11)
    else:
        assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


@at_every_precision
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_subnormal_activations_and_scales_are_not_flushed(
    backend: BackendUnderTest, bits: int, dtype: torch.dtype
) -> None:
    K, N = SMALL_SHAPES[bits]
    weight = build(Case(bits, K, N, 16))
    weight.scales.copy_(weight.scales * 2**-14)
    assert (weight.scales < torch.finfo(torch.float16).tiny).any()
    x = activations(3, K, torch.float32).mul(torch.finfo(dtype).tiny).to(dtype) if dtype == torch.float16 else None
    x = activations(3, K, dtype) if x is None else x
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args)
    assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


@at_every_precision
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_nan_and_inf_propagate_along_their_row_only(
    backend: BackendUnderTest, bits: int, value: float, dtype: torch.dtype
) -> None:
    K, N = SMALL_SHAPES[bits]
    weight = build(Case(bits, K, N, 16, "perm"))
    x = activations(4, K, dtype)
    x[2, 5] = value
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args).cpu()
    assert out[[0, 1, 3]].isfinite().all()
    expected = x[2:3].double() @ weight.dense
    assert torch.equal(out[2:3].isnan(), expected.isnan())
    assert torch.equal(out[2:3].isinf(), expected.isinf())
    assert torch.equal(out[2:3][expected.isinf()].sign(), expected[expected.isinf()].sign().to(dtype))


@at_every_precision
@pytest.mark.parametrize(("bits", "magnitude"), OVERFLOWING.items())
def test_nothing_overflows_before_the_final_rounding(backend: BackendUnderTest, bits: int, magnitude: float) -> None:
    """Activations of one sign, whose unscaled float16 partial sums (the original's) are inf."""
    K, N = SMALL_SHAPES[bits]
    case = Case(bits, K, N, K)
    weight = build(case, q=torch.full((K, N), 2**bits - 1))
    weight.scales.fill_(2.0**-14)
    x = torch.full((2, K), magnitude, dtype=torch.float16)
    unscaled = (x.double() @ (weight.q - weight.z[weight.groups]).double()).abs().max()
    assert unscaled > torch.finfo(torch.float16).max
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args)
    assert out.isfinite().all()
    assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


@at_every_precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_sums_are_finite_up_to_the_promised_range(backend: BackendUnderTest, bits: int, dtype: torch.dtype) -> None:
    """A group's sum of |x| * 2**bits just below 2**127, before its scale makes less of it."""
    K, N = SMALL_SHAPES[bits]
    weight = build(Case(bits, K, N, K), q=torch.full((K, N), 2**bits - 1))
    weight.scales.fill_(2.0**-14)
    x = torch.full((2, K), 0.99 * 2.0**127 / (2**bits * K)).to(dtype)
    assert 0.98 * 2.0**127 < float(x[0].double().sum()) * 2**bits < 2.0**127
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args)
    assert out.isfinite().all()
    assert_within_bound(out, x, weight.dense, *backend.gemm_error(x, weight))


@at_every_precision
def test_a_sum_beyond_float16_is_inf_with_its_sign(backend: BackendUnderTest) -> None:
    K, N = SMALL_SHAPES[4]
    weight = build(Case(4, K, N, K), q=torch.full((K, N), 15))
    weight.scales.fill_(1.0)
    weight.qzeros.fill_(0)
    x = torch.tensor([[60000.0] * K, [-60000.0] * K], dtype=torch.float16)
    out = backend.ops.gptq_gemm(x.to(backend.device), *weight.to(backend.device).args).cpu()
    assert torch.equal(out, torch.tensor([[float("inf")], [float("-inf")]], dtype=torch.float16).expand(2, N))


@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_v1_stored_maximum_is_zero_point_two_to_the_bits(backend: BackendUnderTest, bits: int) -> None:
    K, N = SMALL_SHAPES[bits]
    weight = build(Case(bits, K, N, K, v2=False), q=torch.zeros(K, N, dtype=torch.long))
    weight.qzeros.fill_(-1)
    weight.scales.fill_(1.0)
    out = backend.ops.gptq_dequantize(*weight.to(backend.device).args)
    assert torch.equal(out.cpu(), torch.full((K, N), -float(2**bits), dtype=torch.float16))


@at_every_precision
@pytest.mark.parametrize("bits", SMALL_SHAPES)
def test_results_repeat_bit_for_bit(backend: BackendUnderTest, bits: int) -> None:
    K, N = SMALL_SHAPES[bits]
    weight = build(Case(bits, K, N, 16, "perm")).to(backend.device)
    x = activations(33, K, torch.float16).to(backend.device)
    first = backend.ops.gptq_gemm(x, *weight.args)
    assert all(torch.equal(first, backend.ops.gptq_gemm(x, *weight.args)) for _ in range(3))


def check_parts(backend: BackendUnderTest, x: torch.Tensor, parts: list[Weight]) -> None:
    """The columns of each part are those of gptq_gemm: in their bits, or in their NaN and within its bound."""
    on_device = [part.to(backend.device) for part in parts]
    columns = [part.case.N for part in parts]
    out = backend.ops.gptq_gemm_multi(x.to(backend.device), *multi_args(on_device))
    assert out.shape == (len(x), sum(columns))
    for part, weight, result in zip(parts, on_device, out.split(columns, 1), strict=True):
        alone = backend.ops.gptq_gemm(x.to(backend.device), *weight.args)
        if backend.parts_have_the_bits_of_gemm:
            torch.testing.assert_close(result, alone, rtol=0, atol=0, equal_nan=True)
            continue
        assert torch.equal(result.isnan(), alone.isnan())
        finite = ~x.isnan().any(1)
        assert_within_bound(result.cpu()[finite], x[finite], part.dense, *backend.gemm_error(x[finite], part))


COLUMNS = (96, 32, 160)


@at_every_precision_of(
    Case(bits, 8 * SMALL_SHAPES[bits][0], COLUMNS[0], 32 if bits == 4 else 24, *order, v2=bits != 4)
    for bits in SMALL_SHAPES
    for order in ORDERS
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_a_part_are_those_of_gemm(backend: BackendUnderTest, case: Case, dtype: torch.dtype) -> None:
    parts = build_parts(case, COLUMNS)
    for M in (0, 1, 5, 33):
        x = activations(M, case.K, dtype)
        x[M // 2 : M // 2 + 1, 5] = float("nan")
        check_parts(backend, x, parts)


@at_every_precision
def test_scales_of_parts_may_have_other_dtypes(backend: BackendUnderTest) -> None:
    K, N = SMALL_SHAPES[4]
    parts = [build(Case(4, K, N, 32, "perm", scales_dtype=dtype)) for dtype in DTYPES]
    check_parts(backend, activations(3, K, torch.float16), parts)


@at_every_precision
def test_group_size_zero_means_K_over_G(backend: BackendUnderTest) -> None:
    weight = build(Case(4, 480, 24, 96)).to(backend.device)
    x = activations(3, 480, torch.float16).to(backend.device)
    said = backend.ops.gptq_gemm(x, *weight.args)
    assert torch.equal(said, backend.ops.gptq_gemm(x, *weight.args[:-1], 0))


@at_every_precision
@pytest.mark.parametrize("group_size", [488, 2**31, 2**40, 2**63 - 1])
def test_a_group_may_be_larger_than_the_weight(backend: BackendUnderTest, group_size: int) -> None:
    weight = build(Case(4, 480, 24, 480)).to(backend.device)
    x = activations(3, 480, torch.float16).to(backend.device)
    args = (*weight.args[:-1], group_size)
    assert torch.equal(backend.ops.gptq_gemm(x, *args), backend.ops.gptq_gemm(x, *weight.args))
    assert torch.equal(backend.ops.gptq_dequantize(*args), backend.ops.gptq_dequantize(*weight.args))


@at_every_precision
def test_arguments_are_neither_changed_nor_returned(backend: BackendUnderTest) -> None:
    weight = build(Case(4, 64, 32, 16, "perm")).to(backend.device)
    x = activations(3, 64, torch.float16).to(backend.device)
    tensors = [x, *weight.args[:4]]
    before = [t.clone() for t in tensors]
    pointers = {t.data_ptr() for t in tensors}
    results = [
        backend.ops.gptq_gemm(x, *weight.args),
        backend.ops.gptq_gemm_multi(x, *multi_args([weight])),
        backend.ops.gptq_gemm_dx(activations(3, 32, torch.float16).to(backend.device), *weight.args),
        backend.ops.gptq_dequantize(*weight.args),
        backend.ops.gptq_unshuffle(weight.qweight, weight.row_order, 4),
    ]
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert pointers.isdisjoint(r.data_ptr() for r in results)


def test_what_a_permutation_with_duplicates_leaves_out_is_refused_or_nan(backend: BackendUnderTest) -> None:
    """Refused where its values can be read, on a CPU; NaN on a GPU, and never what memory held before."""
    torch.use_deterministic_algorithms(False)  # which fills all memory with NaN
    weight = build(Case(4, 64, 32, 16, "perm")).to(backend.device)
    missing, weight.row_order[3] = int(weight.row_order[3]), weight.row_order[5]
    calls = {
        "gptq_dequantize": weight.args,
        "gptq_gemm_dx": (torch.randn(2, 32, device=backend.device), *weight.args),
    }
    for name, args in calls.items():
        if backend.device == "cpu" and backends.serving(name, "CPU") is not backends.triton.BACKEND:
            with pytest.raises(ValueError, match=f"^{name}: g_idx must be a permutation; got"):
                getattr(backend.ops, name)(*args)
            continue
        rows = getattr(backend.ops, name)(*args)
        rows = rows if name == "gptq_dequantize" else rows.t()
        assert rows[missing].isnan().all()
        assert rows[torch.arange(64) != missing].isfinite().all()
