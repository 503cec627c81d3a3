"""ExllamaLinear: a Linear layer over a packed GPTQ weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from exllama_ops.layout.checks import fills_words, words_rule
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.groups import num_groups, row_groups
from exllama_ops.layout.interning import intern, intern_copy
from exllama_ops.layout.shuffle import inverse_permutation
from exllama_ops.layout.weight import GptqWeight, PackedWeight, no_order
from exllama_ops.ops import gptq_gemm
from exllama_ops.prepare import prepare


class ExllamaLinear(nn.Module):
    """``y = x @ W + bias`` with a GPTQ weight ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``; inference and LoRA.

    The constructor makes a layer of zeros to load a state_dict into; `from_weight` makes one from a weight. All state
    is in buffers, so nothing here is trained: gradients flow to x alone.

    Args:
        in_features: K, filling whole words (a multiple of 16, 32, 8, 4 for 2, 3, 4, 8 bits).
        out_features: N, likewise.
        bits: 2, 3, 4 or 8.
        group_size: rows of a group, at least 1; the last group may be partial.
        bias: whether there is a bias.
        act_order: whether the rows have an order of their own: a permutation, or a raw g_idx if not shuffled.
        shuffled: whether qweight is in shuffled order. False only for weights whose groups have unequal sizes.
        num_groups: rows of scales, where a raw g_idx needs another number than ceil(K / group_size).
        dtype: of the bias; the default dtype if None.
        scales_dtype: float16, bfloat16 or float32.
        device: where the buffers lie; "meta" works.

    Shape:
        x: (*, K) float16, bfloat16 or float32, any strides; y: (*, N) in x's dtype. Under autocast x is cast to
        the autocast dtype, the scales never are.

    Attributes:
        layout: (3,) int32, bits, group_size and shuffled: a state_dict of another layout is refused.
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32, the zero points themselves (v2).
        scales: (G, N); `.to(dtype)` leaves them as they are.
        perm: (K,) or (0,) int32, if shuffled. Layers with equal ones share one tensor; a state_dict has copies.
        g_idx: (K,) or (0,) int32, if not shuffled; likewise.
        bias: (N,) or None.

    Raises:
        ValueError: an argument is unsupported, or x's last size is not K.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    perm: Tensor
    g_idx: Tensor
    bias: Tensor | None

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
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_construction(in_features, out_features, bits, group_size)
        if num_groups is not None and (shuffled or not act_order):
            raise ValueError("ExllamaLinear: num_groups is for a raw g_idx: shuffled=False and act_order=True")
        G = _groups(in_features, group_size) if num_groups is None else num_groups
        row_entries = in_features if act_order else 0

        def int32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        rows = torch.arange(row_entries, dtype=torch.int32, device=device) if shuffled else int32(row_entries)
        self.set_packed(
            PackedWeight(
                qweight=int32(in_features * bits // 32, out_features),
                qzeros=int32(G, out_features * bits // 32),
                scales=torch.zeros(G, out_features, dtype=scales_dtype, device=device),
                perm=rows if shuffled else int32(0),
                g_idx=int32(0) if shuffled else rows,
                shuffled=shuffled,
                bits=bits,
                group_size=group_size,
                bias=torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
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

    def set_packed(self, weight: PackedWeight) -> None:
        """Compute with another weight from now on: the buffers are replaced by those of ``weight``."""
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.shuffled = weight.shuffled
        self.register_buffer("layout", torch.tensor(self._layout, dtype=torch.int32, device=weight.qweight.device))
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("qzeros", weight.qzeros)
        self.register_buffer("scales", weight.scales)
        self.register_buffer(self._order_name, weight.row_order)
        self.register_buffer("bias", weight.bias)

    @property
    def _order_name(self) -> str:
        return "perm" if self.shuffled else "g_idx"

    @property
    def _layout(self) -> list[int]:
        return [self.bits, self.group_size, int(self.shuffled)]

    @property
    def act_order(self) -> bool:
        """Whether the rows have an order of their own."""
        return bool(self._row_order.shape[0])

    @property
    def _row_order(self) -> Tensor:
        return self.perm if self.shuffled else self.g_idx

    @_row_order.setter
    def _row_order(self, order: Tensor) -> None:
        setattr(self, self._order_name, order)

    @property
    def op_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, int, bool, int]:
        """What the ops take after their first argument."""
        use_v2_format = True
        # Found by their names as attributes, four buffers of an nn.Module take about as long as the op's call.
        buffers: dict[str, Any] = self._buffers
        tensors = (buffers["qweight"], buffers["qzeros"], buffers["scales"], buffers[self._order_name])
        return (*tensors, self.shuffled, self.bits, use_v2_format, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"ExllamaLinear: x must have shape (*, K) with K={self.in_features}; got {tuple(x.shape)}")
        x = _autocast(x)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = gptq_gemm(rows.contiguous(), *self.op_arguments)
        out = out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)
        bias = self._buffers["bias"]
        return out if bias is None else out + bias.to(out.dtype)

    def dequantize(self) -> Tensor:
        """The dense weight as nn.Linear has it: (N, K) in the scales' dtype, a transposed view of new memory."""
        weight: Tensor = torch.ops.exllama.gptq_dequantize(*self.op_arguments)
        return weight.t()

    def to_weight(self) -> GptqWeight:
        """The weight in checkpoint order, in memory of its own: what `from_weight` was given, for `save_gptq`."""
        if self.shuffled:
            qweight = torch.ops.exllama.gptq_unshuffle(self.qweight, self.perm, self.bits)
            groups = row_groups(self.in_features, self.scales.shape[0], self.group_size, self.qweight.device)
            g_idx = groups.index_select(0, inverse_permutation(self.perm)) if self.act_order else None
        else:
            qweight = self.qweight.clone()
            g_idx = self.g_idx.clone() if self.act_order else None
        return GptqWeight(
            qweight=qweight,
            qzeros=self.qzeros.clone(),
            scales=self.scales.clone(),
            g_idx=g_idx,
            bits=self.bits,
            group_size=self.group_size,
            bias=None if self.bias is None else self.bias.clone(),
        )

    def to_packed(self) -> PackedWeight:
        """The weight that the layer computes with; it shares the layer's memory."""
        empty = no_order(self.qweight)
        return PackedWeight(
            qweight=self.qweight,
            qzeros=self.qzeros,
            scales=self.scales,
            perm=self.perm if self.shuffled else empty,
            g_idx=empty if self.shuffled else self.g_idx,
            shuffled=self.shuffled,
            bits=self.bits,
            group_size=self.group_size,
            bias=self.bias,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, act_order={self.act_order}, "
            f"shuffled={self.shuffled}, scales_dtype={self.scales.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExllamaLinear:
        """Let ``.to(dtype)`` and its kin move the scales, but not round them, and leave one order of rows to those that
        shared it."""
        scales, order = self.scales, self._row_order

        def keep_scales_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is scales and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_scales_dtype, recurse)  # type: ignore[no-untyped-call]
        if self._row_order is not order:
            self._row_order = intern_copy(self._row_order, order)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With an order of rows of its own: safetensors refuses shared tensors, and loaders write to a state_dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + self._order_name
        destination[name] = destination[name].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse what torch would load without a word: a weight in another layout, tensors that need a cast."""
        errors = [f"{prefix}{reason}" for reason in self._reasons_against(state_dict, prefix)]
        if errors:
            error_msgs.extend(errors)
            return
        # Loading writes in place, which other layers that share the order must not see. The name keeps the shared one
        # alive, so that a layer which loads the same order has the same tensor again, at its address.
        shared = self._row_order
        self._row_order = shared.clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._row_order = intern(self._row_order)

    def _reasons_against(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        given = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if "qweight" in given and self._order_name not in given:
            return [
                f"qweight: needs {self._order_name} beside it, as this layer has shuffled={self.shuffled}; a GPTQ "
                "checkpoint is read by exllama_ops.open_gptq"
            ]
        reasons = [
            f"{name}: {given[name].dtype} in the state_dict, {buffer.dtype} in the layer, which is not cast"
            + (f"; build the layer with scales_dtype={given[name].dtype}" if name == "scales" else "")
            for name, buffer in self._buffers.items()
            if name in given and name != "bias" and buffer is not None and given[name].dtype != buffer.dtype
        ]
        layout = given.get("layout")
        if layout is not None and not layout.is_meta and layout.tolist() != self._layout:
            reasons.append(f"layout: bits, group_size, shuffled = {layout.tolist()}; this layer has {self._layout}")
        return reasons


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


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to nn.Linear: floating point except float64 becomes the autocast dtype."""
    device_type = x.device.type
    if device_type == "meta":  # autocast knows none, and Dynamo before torch 2.11 cannot ask it which it knows
        return x
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x
