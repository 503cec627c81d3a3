"""ExllamaLinear: a Linear layer over a packed GPTQ weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exllama_ops.huge_pages import clone_in_huge_pages
from exllama_ops.layout.checks import fills_words, words_rule
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.groups import num_groups
from exllama_ops.layout.weight import GptqWeight, PackedWeight
from exllama_ops.nn.leaf import call_as_leaf
from exllama_ops.nn.nested import nested_like, values_of
from exllama_ops.nn.packed_module import PackedModule
from exllama_ops.ops import gptq_gemm
from exllama_ops.prepare import prepare


class ExllamaLinear(PackedModule):
    """``y = x @ W + bias`` with a GPTQ weight ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``; inference and LoRA.

    The constructor makes a layer of zeros to load a state_dict into; `from_weight` makes one from a weight. All state
    is in buffers, so nothing here is trained: gradients flow to x alone. Averages of buffers, such as
    ``AveragedModel(use_buffers=True)`` makes, are of packed words and mean nothing.

    Args:
        in_features: K, filling whole words (a multiple of 16, 32, 8, 4 for 2, 3, 4, 8 bits).
        out_features: N, likewise.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1; the last group may be partial.
        bias: whether there is a bias.
        act_order: whether the rows have an order of their own: a permutation, or a raw g_idx if not shuffled.
        shuffled: whether qweight is in shuffled order. False only for weights whose groups have unequal sizes.
        num_groups: rows of scales, where a raw g_idx or a filled weight has another number than ceil(K / group_size).
        rows: of qweight times 32 / bits, if the weight is filled and has more of them than in_features; see `prepare`.
        source_group_size: that of the checkpoint, if the weight is filled.
        dtype: of the bias; the default dtype if None.
        scales_dtype: float16, bfloat16 or float32.
        device: where the buffers lie; "meta" works.

    Shape:
        x: (*, K) float16, bfloat16 or float32, any strides, or nested with layout=torch.jagged; y: (*, N) in x's dtype.
        Under autocast x is cast to the autocast dtype, the scales never are.

    Attributes:
        layout: (3,) int32, bits, group_size and shuffled: a state_dict of another layout is refused.
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32, the zero points themselves (v2).
        scales: (G, N); `.to(dtype)` leaves them as they are, and a cast past the module is refused.
        scales_dtype: that of the scales.
        perm: (K,) or (0,) int32, if shuffled. Layers with equal ones share one tensor; a state_dict has copies. If the
            weight is filled, (rows + K,).
        g_idx: (K,) or (0,) int32, if not shuffled; likewise.
        bias: (N,) or None.
        source_groups: (G,) int32, if the weight is filled: the group of the checkpoint that each group is part of.

    Raises:
        ValueError: an argument is unsupported, x's last size is not K, or the scales are not what they were made as.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = True,
        *,
        act_order: bool = False,
        shuffled: bool = True,
        num_groups: int | None = None,
        rows: int | None = None,
        source_group_size: int | None = None,
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_construction(in_features, out_features, bits, group_size)
        if num_groups is not None and ((shuffled and rows is None) or not act_order):
            raise ValueError(
                "ExllamaLinear: num_groups is for a raw g_idx, shuffled=False and act_order=True, and for a filled "
                "weight"
            )
        _check_filling(in_features, rows, source_group_size, bits, is_permuted=shuffled and act_order)
        K = in_features if rows is None else rows
        G = _groups(K, group_size) if num_groups is None else num_groups

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return clone_in_huge_pages(torch.zeros((), dtype=dtype, device=device).expand(shape))

        order = zeros(0)
        if act_order and shuffled:
            order = torch.arange(in_features, dtype=torch.int32, device=device)
        elif act_order:
            order = zeros(in_features)
        if rows is not None:
            order = torch.cat([order, order.new_full((rows - in_features,), -1), order])
        self.set_packed(
            PackedWeight(
                qweight=zeros(K * bits // 32, out_features),
                qzeros=zeros(G, out_features * bits // 32),
                scales=zeros(G, out_features, dtype=scales_dtype),
                perm=order if shuffled else zeros(0),
                g_idx=zeros(0) if shuffled else order,
                shuffled=shuffled,
                bits=bits,
                group_size=group_size,
                bias=torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
                source_groups=None if rows is None else zeros(G),
                source_group_size=source_group_size,
            )
        )

    @classmethod
    def from_weight(cls, weight: GptqWeight) -> ExllamaLinear:
        """A layer that computes with ``weight``, on its device; the weight itself stays as it is."""
        return cls.from_packed(prepare(weight))

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> ExllamaLinear:
        """A layer whose buffers are those of ``weight``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.set_packed(weight)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return self._forward_traced(x)  # type: ignore[unreachable]
        if x.layout is not torch.strided or x.is_nested:
            return nested_like(x, self.forward(values_of(x, self.in_features)))
        dim = x.dim()
        if dim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"ExllamaLinear: x must have shape (*, K) with K={self.in_features}; got {tuple(x.shape)}")
        dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
        rows = x if dim == 2 else x.reshape(-1, self.in_features)
        out = gptq_gemm(rows.contiguous(), *self.op_arguments)
        out = out if dim == 2 else out.view(*x.shape[:-1], out.shape[-1])
        try:
            bias: Tensor | None = self._buffers["bias"]
        except KeyError:
            bias = self.bias
        return out if bias is None else out + bias.to(out.dtype)

    def _forward_traced(self, x: Any) -> Any:
        leaf = call_as_leaf(self, x)
        if leaf is not None:
            return leaf
        leading = x.shape[:-1]
        out = torch.ops.exllama.gptq_gemm(x.reshape(leading.numel(), self.in_features).contiguous(), *self.op_arguments)
        out = out.reshape(leading + torch.Size([self.out_features]))
        return out if self.bias is None else out + self.bias.type_as(out)

    def __prepare_scriptable__(self) -> ExllamaLinear:
        """Asked by torch.jit.script."""
        raise NotImplementedError(
            "ExllamaLinear: torch.jit.script cannot compile it; torch.jit.trace, torch.compile and torch.export can"
        )

    def dequantize(self) -> Tensor:
        """The dense weight as nn.Linear has it: (N, K) in the scales' dtype, a transposed view of new memory."""
        weight: Tensor = torch.ops.exllama.gptq_dequantize(*self.op_arguments)
        return weight.t()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, act_order={self.act_order}, "
            f"shuffled={self.shuffled}, scales_dtype={self.scales.dtype}"
            + ("" if self.source_group_size is None else f", source_group_size={self.source_group_size}")
        )


# The constructor's argument of the same name hides the function there.
_groups = num_groups


def _check_construction(in_features: int, out_features: int, bits: int, group_size: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"ExllamaLinear: bits must be one of {SUPPORTED_BITS}; got {bits}")
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not fills_words(size, bits):
            raise ValueError(f"ExllamaLinear: {words_rule(name, size, bits)}")
    if group_size < 1:
        raise ValueError(f"ExllamaLinear: group_size must be at least 1; got {group_size}")


def _check_filling(
    in_features: int, rows: int | None, source_group_size: int | None, bits: int, *, is_permuted: bool
) -> None:
    if rows is None and source_group_size is None:
        return
    if rows is None or source_group_size is None or not is_permuted:
        raise ValueError(
            "ExllamaLinear: rows and source_group_size are both for a filled weight, with shuffled=True, act_order=True"
        )
    if not in_features <= rows or not fills_words(rows, bits):
        raise ValueError(f"ExllamaLinear: {words_rule('rows', rows, bits)}, and be at least in_features={in_features}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to for nn.Linear, if it does: floating point except float64."""
    # The device is only asked for under autocast: that takes as long as all else here.
    if not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    if device_type == "meta":  # autocast knows none, and Dynamo before torch 2.11 cannot ask it which it knows
        return None
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None
