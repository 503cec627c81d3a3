"""Projections of one input whose weights lie side by side in one layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from exllama_ops.layout.columns import side_by_side
from exllama_ops.nn.leaf import call_as_leaf
from exllama_ops.nn.linear import ExllamaLinear, autocast_dtype
from exllama_ops.nn.nested import nested_like, values_of

# What first projections left for the others, by the id of their x; an entry goes when its x does.
_left: dict[int, _Left] = {}

# In the meta of a product's node in a traced graph: what it was made of.
_MADE_OF = "exllama_made_of"


class _Left:
    """The columns of a product, with what it was made of."""

    def __init__(self, x: Tensor, weight: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> None:
        self._x = weakref.ref(x, partial(_left.pop, id(x)))
        self._weight = weight
        self._state = _state(x, weight)
        self.columns = columns

    def is_of(self, x: Tensor, weight: tuple[Tensor, ...]) -> bool:
        return self._x() is x and all(map(is_, self._weight, weight)) and self._state == _state(x, weight)


def _state(x: Tensor, weight: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Another one in another mode, and after a write to an operand, where torch counts them."""
    _, _, scales, _ = weight  # what loads a weight writes to all of it
    return (
        None if x.is_inference() else x._version,
        None if scales.is_inference() else scales._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        autocast_dtype(x),
    )


class FusedProjection(nn.Module):
    """One of several projections of the same x: its columns of ``x @ [W_0 W_1 ...]``, plus its own bias.

    The projection that is called first in a forward multiplies for all, and leaves the others their columns for as long
    as x lives. One that finds none multiplies for itself. So does each where x is a leaf that requires a gradient:
    columns of it would keep it alive. In traced code each multiplies, and what the graph has already is taken from it.
    Made by `fuse`.

    Who calls them by hand must not write to x between the first and the others where torch counts no writes: to a
    tensor of inference mode, or through ``x.data``. The forward that `freeze` has seen does not.

    Args:
        fused: the layer of all columns, which every projection of the group holds.
        sizes: columns of each projection, in the order of their calls.
        index: which of them this one is.
        bias: (N,) or None.

    Shape:
        x: (*, K), y: (*, N) contiguous, as `ExllamaLinear` has them.
    """

    bias: Tensor | None

    def __init__(self, fused: ExllamaLinear, sizes: Sequence[int], index: int, bias: Tensor | None) -> None:
        super().__init__()
        self.fused = fused
        self.sizes = list(sizes)
        self.index = index
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        """K."""
        return self.fused.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.sizes[self.index]

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return self._forward_traced(x)  # type: ignore[unreachable]
        columns = self._traced_columns(x) if torch.compiler.is_dynamo_compiling() else self._columns(x)
        out = _copied(columns[self.index])
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return nested_like(x, out) if x.is_nested else out

    def _columns(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.fused.op_arguments[:4]
        # The first one always multiplies and the last one clears up: an x that is used again meets no former columns.
        first, last = self.index == 0, self.index == len(self.sizes) - 1
        left = None if first else _left.get(id(x))
        columns = left.columns if left is not None and left.is_of(x, weight) else self._split(self._product(x))
        if first and not (x.is_leaf and columns[0].requires_grad):
            _left[id(x)] = _Left(x, weight, columns)
        elif last:
            _left.pop(id(x), None)
        return columns

    def _traced_columns(self, x: Tensor) -> tuple[Tensor, ...]:
        product = self._product(x)
        torch._dynamo.comptime.comptime(_reuse)
        return self._split(product)

    def _product(self, x: Tensor) -> Tensor:
        # A nested x gives its values: torch's split of a nested product crashes in its backward.
        product: Tensor = self.fused(values_of(x, self.in_features) if x.is_nested else x)
        return product

    def _split(self, product: Any) -> tuple[Any, ...]:
        columns: tuple[Any, ...] = torch.split(product, self.sizes, -1)
        return columns

    def _forward_traced(self, x: Any) -> Any:
        leaf = call_as_leaf(self, x)
        if leaf is not None:
            return leaf
        out = self._split(self.fused(x))[self.index].contiguous()
        return out if self.bias is None else out + self.bias.type_as(out)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _copied(column: Tensor) -> Tensor:
    """Contiguous. One row is that already, but autograd refuses to write to what a split returned."""
    return column.clone(memory_format=torch.contiguous_format) if column.requires_grad else column.contiguous()


def _reuse(trace: Any) -> None:
    """For Dynamo, while it traces `_traced_columns`: a product that the graph has already is taken from it."""
    x, gemm = (trace.get_local(name).as_proxy().node for name in ("x", "product"))
    while isinstance(gemm, Node) and gemm.target is not torch.ops.exllama.gptq_gemm:
        gemm = next(iter(gemm.args), None)
    if not isinstance(gemm, Node):  # a hook made something else of it
        return
    result = gemm.meta["example_value"]
    operands = [(node.name, node.meta["example_value"]._version) for node in (x, *gemm.all_input_nodes[1:])]
    made_of = (*operands, result.dtype, result.requires_grad)
    for node in trace.graph().nodes:
        if node.meta.get(_MADE_OF) == made_of:
            gemm.target, gemm.args = torch.ops.aten.alias.default, (node,)
            return
    gemm.meta[_MADE_OF] = made_of


def fuse(layers: Sequence[ExllamaLinear]) -> list[FusedProjection]:
    """The layers as projections of one fused layer, which owns a copy of their weights.

    Args:
        layers: in the order of their calls, all of one x, their weights of one format (`same_format`).
    """
    fused = ExllamaLinear.from_packed(side_by_side([layer.to_packed() for layer in layers]))
    sizes = [layer.out_features for layer in layers]
    return [
        FusedProjection(fused.train(layer.training), sizes, index, layer.bias).train(layer.training)
        for index, layer in enumerate(layers)
    ]
