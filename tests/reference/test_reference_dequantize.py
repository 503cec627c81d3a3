"""reference.gptq_dequantize against exact rational arithmetic and one rounding."""

import exact_arithmetic
import pytest
import torch
from exact_arithmetic import ExactWeight, round_product

from exllama_ops import reference
from exllama_ops.layout.formats import SUPPORTED_BITS

K = 96
N = {2: 16, 3: 32, 4: 24, 8: 12}
# 40 and 64 leave a partial last group.
GROUP_SIZES = [8, 16, 24, 48, K, 40, 64]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

every_width = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_order = pytest.mark.parametrize("order", ExactWeight.ORDERS)
every_scales_dtype = pytest.mark.parametrize("scales_dtype", DTYPES, ids=str)
both_zero_formats = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])


def expected(weight):
    scales, z, dtype = weight.scales.double().tolist(), weight.z, weight.scales.dtype
    rows = [
        [round_product(scales[g][n], weight.q[k][n] - z[g][n], dtype) for n in range(weight.N)]
        for k, g in enumerate(weight.groups)
    ]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


@every_width
@every_order
@every_scales_dtype
@both_zero_formats
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantize_is_the_exact_product_rounded_once(bits, order, scales_dtype, v2, group_size):
    weight = ExactWeight(bits, K, N[bits], group_size, order, v2=v2, scales_dtype=scales_dtype)
    result = reference.gptq_dequantize(*weight.arguments())
    assert (result.dtype, result.shape, result.is_contiguous()) == (scales_dtype, (K, N[bits]), True)
    assert torch.equal(result, expected(weight))


@every_width
@every_scales_dtype
def test_dequantize_rounds_extreme_scales_as_exact_arithmetic_does(bits, scales_dtype):
    """Subnormal scales, the largest ones (whose products are inf) and negative ones."""
    weight = ExactWeight(bits, K, N[bits], 48, "shuffled", scales_dtype=scales_dtype)
    info = torch.finfo(scales_dtype)
    tiny = info.smallest_normal
    extremes = [tiny / 4, info.max, -info.max / 3, tiny * 1.5, -tiny / 2, info.max / 7]
    weight.scales[0, : len(extremes)] = torch.tensor(extremes, dtype=torch.float64).to(scales_dtype)
    result = reference.gptq_dequantize(*weight.arguments())
    assert torch.equal(result, expected(weight))
    assert result.isinf().any()


@every_width
@every_scales_dtype
@pytest.mark.parametrize("group_size", [24, 40])
def test_rows_of_a_permuted_weight_come_back_in_checkpoint_order(bits, scales_dtype, group_size):
    shuffled = ExactWeight(bits, K, N[bits], group_size, "perm", scales_dtype=scales_dtype)
    raw = ExactWeight(bits, K, N[bits], group_size, "raw", scales_dtype=scales_dtype)
    assert (shuffled.q, shuffled.groups) == (raw.q, raw.groups)
    assert torch.equal(reference.gptq_dequantize(*shuffled.arguments()), reference.gptq_dequantize(*raw.arguments()))


@every_width
@pytest.mark.parametrize("order", ["shuffled", "checkpoint", "perm"])
@pytest.mark.parametrize("group_size", [8, 24, K])
def test_group_size_0_means_k_over_g(bits, order, group_size):
    *arguments, said = ExactWeight(bits, K, N[bits], group_size, order).arguments()
    assert torch.equal(
        reference.gptq_dequantize(*arguments, group_size=0), reference.gptq_dequantize(*arguments, group_size=said)
    )


@every_width
def test_v1_stored_maximum_is_zero_two_to_the_bits(bits):
    """q = 0 with scale 1 is minus the zero point: -16 for a stored 15 in 4 bits, not 0 and not -15."""
    n = exact_arithmetic.BLOCK[bits]
    qweight = exact_arithmetic.pack_along_k([[0] * n] * n, bits)
    qzeros = exact_arithmetic.pack_along_n([[2**bits - 1] * n], bits)
    rest = torch.ones(1, n), torch.empty(0, dtype=torch.int32), False, bits
    assert set(reference.gptq_dequantize(qweight, qzeros, *rest).flatten().tolist()) == {-(2.0**bits)}
    v2 = reference.gptq_dequantize(qweight, qzeros, *rest, use_v2_format=True)
    assert set(v2.flatten().tolist()) == {-(2.0**bits - 1)}


@pytest.mark.parametrize("groups", [[5] * K, [k % 7 for k in range(K)], [6 - k // 16 for k in range(K)]])
def test_a_raw_g_idx_may_repeat_skip_and_reverse_groups(groups):
    weight = ExactWeight(4, K, 24, 14, "any")
    assert len(weight.stored) == 7
    weight.groups = groups
    assert torch.equal(reference.gptq_dequantize(*weight.arguments()), expected(weight))


@every_order
@every_scales_dtype
def test_dequantize_leaves_its_arguments_and_gives_new_memory(order, scales_dtype):
    arguments = ExactWeight(4, K, 24, 24, order, scales_dtype=scales_dtype).arguments()
    before = [argument.clone() for argument in arguments[:4]]
    result = reference.gptq_dequantize(*arguments)
    for argument, was in zip(arguments[:4], before, strict=True):
        assert torch.equal(argument, was)
        assert result.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr()
