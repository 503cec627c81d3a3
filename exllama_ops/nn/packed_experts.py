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

    The weight of each layer that is put in is copied into stacks, and the layer computes with views of them from then
    on. So one layer at most is in memory twice. What is loaded into a layer, or saved from it, is what this module
    computes with. The stacks themselves are in no state_dict.

    Args:
        like: a layer whose tensors have the sizes of all others'.
        num_experts: how many layers there will be; each must be `put` in before the first call.

    Shape:
        x: (M, K), sorted by expert; offsets: (E + 1,) int32, as `gptq_moe_gemm` takes them; y: (M, N) in x's dtype.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    row_order: Tensor
    bias: Tensor | None

    def __init__(self, like: ExllamaLinear, num_experts: int) -> None:
        super().__init__()
        self._like = _kind(like)
        self._layers: list[ExllamaLinear | None] = [None] * num_experts
        self._options = like.op_arguments[4:]
        self._order_name = "perm" if like.shuffled else "g_idx"
        for name in _STACKED:
            tensor = self._of(like, name)
            if tensor is not None and tensor.numel():
                tensor = _stack_of(tensor, num_experts)
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def of(cls, layers: Sequence[ExllamaLinear]) -> PackedExperts:
        """The stacks of the layers of the experts 0, 1, ...

        Raises:
            ValueError: they differ in more than their values.
        """
        if not layers:
            raise ValueError("PackedExperts: there must be at least one expert; got none")
        stacks = cls(layers[0], len(layers))
        for expert, layer in enumerate(layers):
            stacks.put(expert, layer)
        return stacks

    def put(self, expert: int, layer: ExllamaLinear) -> None:
        """Copy the weight of a layer into the stacks, and let it compute with views of them.

        The layer then refuses to have its tensors replaced, which the product of all experts would not see.

        Raises:
            ValueError: see `reason_against`; nothing has changed then.
        """
        if reason := self.reason_against(layer):
            raise ValueError(f"PackedExperts: {reason}")
        self._layers[expert] = layer
        layer._in_stacks = (self, expert)
        self.share(expert)

    def share(self, expert: int) -> None:
        """Copy what a layer holds now into the stacks. It has views of them from then on."""
        layer = self._layers[expert]
        if layer is not None:
            for name in _STACKED:
                self._share(expert, layer, name)

    def release(self) -> None:
        """Let go of the layers: each computes with its own tensors alone, and they may be replaced again."""
        for layer in self._layers:
            if layer is not None:
                layer._in_stacks = None

    def reason_against(self, layer: ExllamaLinear) -> str:
        """Why the weight of a layer cannot be in the stacks; empty if it can."""
        if layer.qweight.is_meta:
            return "a layer must have its weight in memory"
        differing = [
            f"{name} {got}, not {expected}"
            for name, got, expected in zip(_KIND, _kind(layer), self._like, strict=True)
            if got != expected
        ]
        return f"all experts must be of one kind; got one with {', '.join(differing)}" if differing else ""

    @property
    def is_full(self) -> bool:
        """Whether each expert has its layer."""
        return None not in self._layers

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

    def _of(self, layer: ExllamaLinear, name: str) -> Tensor | None:
        return layer._buffers[self._order_name if name == "row_order" else name]

    def _share(self, expert: int, layer: ExllamaLinear, name: str) -> None:
        """Copy one tensor of a layer, which has a view from then on; but layers share orders with others."""
        stack, tensor = self._buffers[name], self._of(layer, name)
        if stack is None or tensor is None or not tensor.numel():
            return
        entry = stack[expert]
        if name == "row_order":
            entry.copy_(tensor)
        elif tensor.device != entry.device or tensor.data_ptr() != entry.data_ptr():
            entry.copy_(tensor)
            layer._buffers[name] = entry

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """``.to(device)`` gives each layer tensors of its own, of which new stacks are made."""
        first = self._layers[0]
        if first is None:
            return self
        for name in _STACKED:
            tensor, stack = self._of(first, name), self._buffers[name]
            if tensor is None or stack is None or not tensor.numel():
                self._buffers[name] = tensor
            elif (tensor.device, tensor.dtype) != (stack.device, stack.dtype):
                self._buffers[name] = _stack_of(tensor, len(self._layers))
        for expert in range(len(self._layers)):
            self.share(expert)
        return self


_STACKED = ("qweight", "qzeros", "scales", "row_order", "bias")
# What the layers of a stack have in common, and how errors call it.
_KIND = ("in_features", "out_features", "bits", "group_size", "shuffled", "shapes", "dtypes", "device")


def _kind(layer: ExllamaLinear) -> tuple[Any, ...]:
    tensors = (*layer.op_arguments[:4], layer.bias)
    return (
        layer.in_features,
        layer.out_features,
        layer.bits,
        layer.group_size,
        layer.shuffled,
        [None if tensor is None else tuple(tensor.shape) for tensor in tensors],
        [None if tensor is None else tensor.dtype for tensor in tensors],
        layer.qweight.device,
    )


def _stack_of(tensor: Tensor, count: int) -> Tensor:
    """Memory for tensors of one shape, in huge pages on a CPU: what nobody writes to takes none."""
    shape = (count, *tensor.shape)
    if tensor.device.type == "cpu" and type(tensor) is Tensor:
        return empty_in_huge_pages(count * tensor.nbytes).view(tensor.dtype).view(shape)
    return tensor.new_empty(shape)
