"""gptq_dequantize: the dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_dequantize
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.ops import _library, _vmap
from exllama_ops.ops._linear import WEIGHT_ARGUMENTS


def gptq_dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """The dense weight ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``, rounded once, in the rows of the checkpoint.

    Row k of W multiplies ``x[:, k]`` in `gptq_gemm`, whatever the permutation. No gradient flows to the scales.

    Args:
        qweight: as in `gptq_gemm`, like every other argument.
        qzeros: see `gptq_gemm`.
        scales: see `gptq_gemm`.
        g_idx: see `gptq_gemm`.
        use_exllama: see `gptq_gemm`.
        bit: see `gptq_gemm`.
        use_v2_format: see `gptq_gemm`.
        group_size: see `gptq_gemm`.

    Returns:
        (K, N) in the scales' dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong.

    Source: `exllama_ops.reference.gptq_dequantize`.
    """
    result: Tensor = torch.ops.exllama.gptq_dequantize(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size
    )
    return result


@from_op_arguments(Weight)
def fake_gptq_dequantize(weight: Weight) -> Tensor:
    check_gptq_dequantize(weight)
    return weight.scales.new_empty((weight.in_features, weight.N))


_library.define_op("gptq_dequantize", WEIGHT_ARGUMENTS, "Tensor", fake=fake_gptq_dequantize)
_library.no_gradient("gptq_dequantize")
_library.register_vmap("gptq_dequantize", _vmap.one_by_one)
