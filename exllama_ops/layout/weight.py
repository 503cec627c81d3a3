"""The two forms of a quantized weight: `GptqWeight`, as a checkpoint has it, and `PackedWeight`, as the ops take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_dequantize
from exllama_ops.layout.formats import SUPPORTED_BITS


def no_order(like: Tensor) -> Tensor:
    """The empty int32 tensor by which the ops say "no permutation" and "no g_idx"."""
    return torch.empty(0, dtype=torch.int32, device=like.device)


def _check_bias(kind: str, bias: Tensor | None, N: int, device: torch.device) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (N,):
        raise ValueError(f"{kind}: bias must have shape (N,) = ({N},); got {tuple(bias.shape)}")
    if not bias.is_floating_point() or bias.device != device:
        raise ValueError(f"{kind}: bias must be floating point on {device}; got {bias.dtype} on {bias.device}")


@dataclass(frozen=True, eq=False)
class GptqWeight:
    """A weight in checkpoint order, ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])`` with ``g = g_idx[k]``.

    Zero points are stored as they are (the v2 convention), whatever the file had: `exllama_ops.checkpoint` turns v1
    words into v2 while reading.

    Args:
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32, the zero points themselves.
        scales: (G, N) float16, bfloat16 or float32.
        g_idx: (K,) int32, the group of each row; None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1 (K for one group, never -1); the last group may be partial.
        bias: (N,) or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together. The data is not read.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int
    group_size: int
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"GptqWeight: bits must be one of {SUPPORTED_BITS}; got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"GptqWeight: group_size must be at least 1; got {self.group_size}")
        g_idx = no_order(self.qweight) if self.g_idx is None else self.g_idx
        check_gptq_dequantize(
            self.qweight, self.qzeros, self.scales, g_idx, False, self.bits, True, self.group_size, op="GptqWeight"
        )
        _check_bias("GptqWeight", self.bias, self.out_features, self.qweight.device)

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as `torch.ops.exllama.gptq_gemm` takes it; made from a `GptqWeight` by `exllama_ops.prepare`.

    Args:
        qweight: (K * bits / 32, N) int32, shuffled or in checkpoint order.
        qzeros: (G, N * bits / 32) int32, the zero points themselves (v2).
        scales: (G, N) float16, bfloat16 or float32.
        perm: (K,) int32, ``argsort(g_idx)``: row k of this weight is row ``perm[k]`` of the checkpoint. Empty for none,
            and always if not shuffled.
        g_idx: (K,) int32, the group of each row. Empty for ``k // group_size``, and always if shuffled.
        shuffled: whether qweight is in shuffled order; the op's ``use_exllama``.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1.
        bias: (N,) or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together. The data is not read.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    perm: Tensor
    g_idx: Tensor
    shuffled: bool
    bits: int
    group_size: int
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"PackedWeight: group_size must be at least 1; got {self.group_size}")
        unused, name = (self.g_idx, "g_idx") if self.shuffled else (self.perm, "perm")
        if unused.numel():
            raise ValueError(
                f"PackedWeight: {name} must be empty for shuffled={self.shuffled}; got {unused.numel()} rows"
            )
        check_gptq_dequantize(
            self.qweight, self.qzeros, self.scales, self.row_order, self.shuffled, self.bits, True, self.group_size,
            op="PackedWeight",
        )  # fmt: skip
        _check_bias("PackedWeight", self.bias, self.out_features, self.qweight.device)

    @property
    def row_order(self) -> Tensor:
        """What the op takes as its ``g_idx``: perm if shuffled, else g_idx."""
        return self.perm if self.shuffled else self.g_idx

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]
