"""reference.gptq_gemm and reference.gptq_gemm_dx against exact sums, within the bound of exact_arithmetic.bound."""

import pytest
import torch
from exact_arithmetic import ExactWeight, assert_within_bound, exact

from exllama_ops import reference
from exllama_ops.layout.formats import SUPPORTED_BITS

K = 96
N = {2: 16, 3: 32, 4: 24, 8: 12}
GROUP_SIZES = [8, 16, 24, 48, K, 40, 64]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_order = pytest.mark.parametrize("order", ExactWeight.ORDERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_scales_dtype = pytest.mark.parametrize("scales_dtype", DTYPES, ids=str)
both_zero_formats = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
both_products = pytest.mark.parametrize("product", [reference.gptq_gemm, reference.gptq_gemm_dx])


def operand(product, weight, dtype, M=3, seed=1):
    """x, or grad, with an outlier in each row and a small one."""
    generator = torch.Generator().manual_seed(seed)
    size = weight.K if product is reference.gptq_gemm else weight.N
    values = torch.randn(M, size, generator=generator)
    values[:, 1], values[:, 2] = 300.0, 1e-4
    return values.to(dtype)


def dense(product, weight):
    """What the operand is multiplied by: W, or its transpose."""
    return weight.exact() if product is reference.gptq_gemm else weight.exact().t()


@every_width
@every_order
@both_zero_formats
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_and_dx_are_the_exact_sums_within_the_bound(bits, order, v2, group_size):
    weight = ExactWeight(bits, K, N[bits], group_size, order, v2=v2)
    arguments, W = weight.arguments(), weight.exact()
    x = operand(reference.gptq_gemm, weight, torch.float16, M=2)
    grad = operand(reference.gptq_gemm_dx, weight, torch.float16, M=1)
    assert_within_bound(reference.gptq_gemm(x, *arguments), exact(x), W)
    assert_within_bound(reference.gptq_gemm_dx(grad, *arguments), exact(grad), W.t())


@both_products
@every_width
@pytest.mark.parametrize("order", ["perm", "any"])
@every_dtype
@every_scales_dtype
def test_every_pair_of_dtypes_keeps_the_bound(product, bits, order, dtype, scales_dtype):
    weight = ExactWeight(bits, K, N[bits], 40, order, v2=False, scales_dtype=scales_dtype)
    first = operand(product, weight, dtype)
    result = product(first, *weight.arguments())
    assert (result.dtype, result.is_contiguous()) == (dtype, True)
    assert_within_bound(result, exact(first), dense(product, weight))


@both_products
@every_dtype
def test_sums_that_cancel_keep_the_bound(product, dtype):
    """Terms of 3e4 that leave next to nothing: sums in float32 would lose it."""
    weight = ExactWeight(4, K, 24, K, "shuffled", scales_dtype=torch.float32)
    half_k, half_n = K // 2, 24 // 2
    for row in (*weight.stored, *weight.q):
        row[half_n:] = row[:half_n]
    weight.q[half_k:] = weight.q[:half_k]
    weight.scales[0, half_n:] = weight.scales[0, :half_n]
    first = operand(product, weight, torch.float32) * 100
    half = first.shape[1] // 2
    first[:, half:] = -first[:, :half] + 0.25
    first = first.to(dtype)
    assert_within_bound(product(first, *weight.arguments()), exact(first), dense(product, weight))


@both_products
@every_width
@every_order
@every_dtype
def test_float32_matmul_precision_does_not_change_a_bit(product, bits, order, dtype):
    weight = ExactWeight(bits, K, N[bits], 24, order, scales_dtype=torch.float32)
    first = operand(product, weight, dtype)
    expected = product(first, *weight.arguments())
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(product(first, *weight.arguments()), expected), precision
    finally:
        torch.set_float32_matmul_precision(before)


@both_products
@every_order
@every_dtype
def test_nan_and_inf_spoil_their_row_and_no_other(product, order, dtype):
    weight = ExactWeight(4, K, 24, 24, order)
    first = operand(product, weight, dtype, M=4)
    clean = product(first, *weight.arguments())
    first[1, 5], first[2, 7] = float("nan"), float("inf")
    result = product(first, *weight.arguments())
    assert torch.equal(result[[0, 3]], clean[[0, 3]])
    assert result[1].isnan().all()
    # inf times the weight is an infinity of its sign, and NaN where the weight is 0.
    factors = torch.tensor([float(factor) for factor in dense(product, weight).rows[7]])
    expected = (factors * float("inf")).to(dtype)
    assert torch.equal(result[2].nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@both_products
def test_nan_propagates_where_the_weight_is_zero(product):
    weight = ExactWeight(4, K, 24, 24, "shuffled")
    weight.stored = [[8] * 24 for _ in weight.stored]
    weight.q = [[8] * 24 for _ in weight.q]
    first = operand(product, weight, torch.float16)
    first[1, 5], first[2, 7] = float("nan"), float("inf")
    result = product(first, *weight.arguments())
    assert not result[0].any()
    assert result[1:].isnan().all()


@both_products
@every_width
def test_a_float16_result_beyond_65504_is_inf(product, bits):
    weight = ExactWeight(bits, K, N[bits], K, "shuffled")
    weight.scales.fill_(1.0)
    weight.stored = [[0] * N[bits]]
    weight.q = [[1] * N[bits] for _ in range(K)]
    terms = K if product is reference.gptq_gemm else N[bits]
    # The sums: 65504, the largest number; just below and at half a step above it; the negative of that.
    targets = [65504.0, 65519.0, 65520.0, -65520.0]
    first = torch.zeros(len(targets), terms, dtype=torch.float16)
    for m, target in enumerate(targets):
        first[m, 0] = target // 2
        first[m, 1] = target - target // 2 - (first[m, 0].item() - target // 2)
        first[m, 2] = target - first[m, :2].sum(dtype=torch.float64).item()
    assert first.sum(1, dtype=torch.float64).tolist() == targets
    result = product(first, *weight.arguments())
    assert result[:, 0].tolist() == [65504.0, 65504.0, float("inf"), float("-inf")]


@every_width
@every_order
def test_large_activations_of_one_sign_stay_finite_where_the_sum_is(bits, order):
    """|x| = 4000 overflows the half-precision partial sums of the original kernels, in 3 bits already at 512."""
    weight = ExactWeight(bits, K, N[bits], 48, order)
    weight.scales.copy_(weight.scales.sign() / 2**bits / 8)
    first = torch.full((2, K), 4000.0, dtype=torch.float16)
    first[1] = -4000.0
    result = reference.gptq_gemm(first, *weight.arguments())
    sums = exact(first) @ weight.exact()
    unscaled = max(
        abs(sum(4000 * (weight.q[k][n] - weight.z[weight.groups[k]][n]) for k in range(K))) for n in range(N[bits])
    )
    assert unscaled > 65504
    finite = [[abs(value) < 65504 * sums.denominator for value in row] for row in sums.rows]
    assert any(map(any, finite))
    assert torch.equal(result.isfinite(), torch.tensor(finite))
    assert_within_bound(result, exact(first), weight.exact())


@every_width
@every_order
@every_scales_dtype
@pytest.mark.parametrize("group_size", [24, 40])
def test_one_hot_x_returns_the_rows_of_dequantize(bits, order, scales_dtype, group_size):
    arguments = ExactWeight(bits, K, N[bits], group_size, order, scales_dtype=scales_dtype).arguments()
    W = reference.gptq_dequantize(*arguments)
    assert torch.equal(reference.gptq_gemm(torch.eye(K, dtype=scales_dtype), *arguments), W)
    assert torch.equal(reference.gptq_gemm_dx(torch.eye(N[bits], dtype=scales_dtype), *arguments), W.t())


@every_width
@every_order
@every_dtype
def test_a_one_hot_weight_returns_columns_of_x(bits, order, dtype):
    """q = z except for one row of each column, where q = z + 1, and scale 1."""
    weight = ExactWeight(bits, K, N[bits], 24, order, scales_dtype=dtype)
    weight.scales.fill_(1.0)
    weight.stored = [[field % (2**bits - 1) for field in row] for row in weight.stored]
    hot = [(7 * n + 3) % K for n in range(N[bits])]
    weight.q = [[weight.stored[g][n] + (k == hot[n]) for n in range(N[bits])] for k, g in enumerate(weight.groups)]
    x = operand(reference.gptq_gemm, weight, dtype)
    grad = operand(reference.gptq_gemm_dx, weight, dtype)
    assert torch.equal(reference.gptq_gemm(x, *weight.arguments()), x[:, hot])
    expected = torch.zeros(3, K, dtype=dtype)
    expected[:, hot] = grad
    assert torch.equal(reference.gptq_gemm_dx(grad, *weight.arguments()), expected)


@both_products
@every_width
@every_order
@every_dtype
def test_no_tokens_give_an_empty_result(product, bits, order, dtype):
    weight = ExactWeight(bits, K, N[bits], 24, order)
    first = operand(product, weight, dtype, M=0)
    result = product(first, *weight.arguments())
    assert (result.shape, result.dtype) == ((0, len(dense(product, weight).rows[0])), dtype)


@both_products
@every_order
@every_dtype
@every_scales_dtype
def test_products_leave_their_arguments_and_give_new_memory(product, order, dtype, scales_dtype):
    weight = ExactWeight(4, K, 24, 24, order, scales_dtype=scales_dtype)
    arguments = operand(product, weight, dtype), *weight.arguments()
    before = [argument.clone() for argument in arguments[:5]]
    result = product(*arguments)
    for argument, was in zip(arguments[:5], before, strict=True):
        assert torch.equal(argument, was)
        assert result.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr()


@both_products
@every_width
def test_the_order_of_rows_inside_a_group_does_not_matter(product, bits):
    """Any argsort serves, if the weight is shuffled with the same one: only the order of the sums differs."""
    weight = ExactWeight(bits, K, N[bits], 40, "perm", scales_dtype=torch.float32)
    stable = weight.perm
    other = [k for _, _, k in sorted((weight.groups[k], -k, k) for k in stable)]
    assert other != stable
    first = operand(product, weight, torch.float32)
    results, dequantized = [], []
    for weight.perm in (stable, other):
        results.append(product(first, *weight.arguments()))
        dequantized.append(reference.gptq_dequantize(*weight.arguments()))
        assert_within_bound(results[-1], exact(first), dense(product, weight))
    assert torch.equal(*dequantized)


@both_products
@every_order
def test_a_call_gives_the_same_bits_every_time(product, order):
    weight = ExactWeight(3, K, 32, 24, order)
    first = operand(product, weight, torch.float32, M=9)
    results = [product(first, *weight.arguments()) for _ in range(3)]
    assert all(torch.equal(results[0], result) for result in results)


@every_width
@every_order
def test_dx_is_the_adjoint_of_gemm(bits, order):
    """grad @ (W.T) and x @ W with exact sums: integers as scales, activations and gradients."""
    weight = ExactWeight(bits, K, N[bits], 40, order, scales_dtype=torch.float32)
    weight.scales.copy_(torch.arange(weight.scales.numel()).reshape(weight.scales.shape) % 5 - 2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-3, 4, (3, K), generator=generator).float()
    grad = torch.randint(-3, 4, (3, N[bits]), generator=generator).float()
    forward = reference.gptq_gemm(x, *weight.arguments())
    backward = reference.gptq_gemm_dx(grad, *weight.arguments())
    assert (forward * grad).sum(dtype=torch.float64) == (x * backward).sum(dtype=torch.float64)
