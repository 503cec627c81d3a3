"""Round-to-nearest quantization, for tests and the demo."""

from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import fills_words, words_rule
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.groups import num_groups, row_groups
from exllama_ops.layout.pack import pack_columns, pack_rows
from exllama_ops.layout.weight import GptqWeight


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    sym: bool = False,
    *,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    scales_dtype: torch.dtype = torch.float16,
) -> GptqWeight:
    """Quantize a Linear weight by rounding to nearest: ``q = round(w / scale) + zero``, clamped to the bits.

    For tests and the demo only. It looks at no data and corrects no error, as GPTQ itself does: use a quantizer such
    as GPTQModel for a model that matters.

    Args:
        weight: (out_features, in_features), as nn.Linear has it; finite.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale and a zero point; -1 for all.
        sym: whether the zero point is 2**(bits - 1) and the range symmetric. Else the range is that of the group,
            widened to contain 0.
        g_idx: (in_features,) the group of each input feature, of any content in [0, G); None for ``k // group_size``.
        bias: (out_features,) to carry along.
        scales_dtype: float16, bfloat16 or float32.

    Returns:
        The weight in checkpoint order, on weight's device.

    Raises:
        ValueError: bits, group_size or the sizes are unsupported, or the weight is not finite.
    """
    _check(weight, bits, group_size)
    W = weight.detach().t().to(torch.float32)  # (K, N)
    K, N = W.shape
    size = K if group_size == -1 else group_size
    G = num_groups(K, size)
    groups = row_groups(K, G, size, W.device).long() if g_idx is None else g_idx.long()

    # A group contains 0: the initial value of the reductions.
    zeros = W.new_zeros(G, N)
    index = groups.unsqueeze(1).expand(K, N)
    low = zeros.scatter_reduce(0, index, W, "amin")
    high = zeros.scatter_reduce(0, index, W, "amax")
    levels = 2**bits - 1
    # The symmetric range is [-2**(bits-1), 2**(bits-1) - 1] steps: its lower end reaches one step further.
    symmetric_step = torch.maximum(-low / 2 ** (bits - 1), high / (2 ** (bits - 1) - 1))
    step = symmetric_step if sym else (high - low) / levels
    # Steps are what the file stores; a group of zeros, or one that underflows, gets the smallest normal step.
    scales = step.clamp(torch.finfo(scales_dtype).tiny, torch.finfo(scales_dtype).max).to(scales_dtype)
    step = scales.to(torch.float32)
    zero = torch.full_like(step, 2 ** (bits - 1)) if sym else (-low / step).round().clamp(0, levels)
    q = ((W / step[groups]).round() + zero[groups]).clamp(0, levels).to(torch.int32)
    return GptqWeight(
        qweight=pack_rows(q, bits),
        qzeros=pack_columns(zero.to(torch.int32), bits),
        scales=scales,
        g_idx=None if g_idx is None else g_idx.to(torch.int32),
        bits=bits,
        group_size=size,
        bias=bias,
    )


def _check(weight: Tensor, bits: int, group_size: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"quantize: bits must be one of {SUPPORTED_BITS}; got {bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"quantize: group_size must be at least 1, or -1 for one group; got {group_size}")
    if weight.dim() != 2:
        raise ValueError(f"quantize: weight must have shape (out_features, in_features); got {tuple(weight.shape)}")
    for name, size in zip(("out_features", "in_features"), weight.shape, strict=True):
        if not fills_words(size, bits):
            raise ValueError(f"quantize: {words_rule(name, size, bits)}")
    if not torch.isfinite(weight).all():
        raise ValueError("quantize: weight must be finite; it holds NaN or inf")
