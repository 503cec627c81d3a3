"""The layers of one projection of all experts, with their weights in stacks, as one product takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from exllama_ops.huge_pages import empty_in_huge_pages
from exllama_ops.nn.linear import ExllamaLinear, autocast_dtype
from exllama_ops.ops import gptq_moe_gemm


class PackedExperts(nn.Module):
    """``y[i] = x[i] @ W[e] + bias[e]`` for rows of x that are sorted by expert.

    The weights of the layers are brought into stacks one layer after the other, so that no more than one of them is in
    memory twice. From then on each layer computes with views of the stacks: what is loaded into a layer, or saved from
    it, is what this module computes with. The stacks themselves are in no state_dict.

    Args:
        layers: of the experts 0, 1, ... They go on to belong to whoever holds them.

    Shape:
        x: (M, K), sorted by expert; offsets: (E + 1,) int32, as `gptq_moe_gemm` takes them; y: (M, N) in x's dtype.

    Raises:
        ValueError: the layers cannot be stacked; see `reasons_against`.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    row_order: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[ExllamaLinear]) -> None:
        super().__init__()
        if reasons := self.reasons_against(layers):
            raise ValueError(f"PackedExperts: {'; '.join(reasons)}")
        self._layers = tuple(layers)
        first = layers[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self._options = first.op_arguments[4:]
        self._orders = "perm" if first.shuffled else "g_idx"
        for name in _STACKED:
            self.register_buffer(name, self._stack(name), persistent=False)

    @staticmethod
    def reasons_against(layers: Sequence[ExllamaLinear]) -> list[str]:
        """Why the weights of some layers cannot be in stacks; empty if they can."""
        if not layers:
            return ["there must be at least one expert"]
        reasons = []
        for name, of in _ALIKE.items():
            kinds = list(dict.fromkeys(map(of, layers)))
            if len(kinds) > 1:
                reasons.append(f"all experts must have one {name}; got {', '.join(map(str, kinds[:3]))}")
        if any(layer.qweight.is_meta for layer in layers):
            reasons.append("an expert has no weight in memory")
        if any(hasattr(layer, "_hf_hook") for layer in layers):
            reasons.append("accelerate moves the experts one by one")
        return reasons

    def forward(self, x: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        """The product of each row.

        Args:
            x: (M, K).
            offsets: (E + 1,) int32.
            ids: (M,) the expert of each row, for its bias. What it is for a row of none does not matter.
        """
        dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
        stacks = (self.qweight, self.qzeros, self.scales, self.row_order)
        y = gptq_moe_gemm(x.contiguous(), *stacks, offsets, *self._options)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)[ids.clamp(0, self.bias.shape[0] - 1)]

    def _stack(self, name: str) -> Tensor | None:
        """The stack of one tensor of the layers, of which they have views from now on."""
        buffer = self._orders if name == "row_order" else name
        first: Tensor | None = self._layers[0]._buffers[buffer]
        if first is None or not first.numel():
            return first
        shape = (len(self._layers), *first.shape)
        if first.device.type == "cpu":
            num_bytes = len(self._layers) * first.nbytes
            stack = empty_in_huge_pages(num_bytes).view(first.dtype).view(shape)
        else:
            stack = first.new_empty(shape)
        for entry, layer in zip(stack, self._layers, strict=True):
            tensor = layer._buffers[buffer]
            assert tensor is not None
            entry.copy_(tensor)
            if name != "row_order":  # layers share orders with others
                layer._buffers[buffer] = entry
        return stack

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """``.to(device)`` gives each layer tensors of its own, of which new stacks are made."""
        self._refresh()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """What was loaded into the layers is in the stacks already, but for the orders."""
        self._refresh()

    def _refresh(self) -> None:
        for name in _STACKED:
            if not self._is_shared(name):
                self._buffers[name] = self._stack(name)

    def _is_shared(self, name: str) -> bool:
        """Whether the layers have views of a stack. Their orders may have been loaded anew."""
        stack = self._buffers[name]
        if name == "row_order":
            return False
        if stack is None:
            return True
        views = (layer._buffers[name] for layer in self._layers)
        return all(
            view is not None and view.device == entry.device and view.data_ptr() == entry.data_ptr()
            for view, entry in zip(views, stack, strict=True)
        )


_STACKED = ("qweight", "qzeros", "scales", "row_order", "bias")

_ALIKE: dict[str, Callable[[ExllamaLinear], Any]] = {
    "in_features": lambda layer: layer.in_features,
    "out_features": lambda layer: layer.out_features,
    "bits": lambda layer: layer.bits,
    "group_size": lambda layer: layer.group_size,
    "order of the bits": lambda layer: "shuffled" if layer.shuffled else "that of the checkpoint",
    "number of groups": lambda layer: layer.scales.shape[0],
    "number of rows": lambda layer: layer.qweight.shape[0] * 32 // layer.bits,
    "number of entries in the order of rows": lambda layer: layer.op_arguments[3].shape[0],
    "dtype of the scales": lambda layer: layer.scales.dtype,
    "dtype of the bias": lambda layer: None if layer.bias is None else layer.bias.dtype,
    "device": lambda layer: layer.qweight.device,
}
