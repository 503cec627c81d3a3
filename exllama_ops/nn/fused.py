"""Projections of one input whose weights lie side by side in one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exllama_ops.layout.columns import side_by_side
from exllama_ops.nn.linear import ExllamaLinear


class FusedProjection(nn.Module):
    """One of several projections of the same x: its columns of ``x @ [W_0 W_1 ...]``, plus its own bias.

    The projection that is called first in a forward multiplies for all and leaves the others their columns on the
    tensor x itself. So nothing outlives x, threads do not meet, and traced code has one product and no state. A
    projection that finds nothing on its x, or an x that was written to since, multiplies for itself. Made by `fuse`.

    Who calls them by hand must not write to x between the first and the others where torch counts no writes: in
    compiled code, and to a tensor of inference mode. The forward that `freeze` has seen does not.

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
        out = self._columns(x)[self.index].contiguous()
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _columns(self, x: Tensor) -> tuple[Tensor, ...]:
        left = None if self.index == 0 else getattr(x, "_exllama_columns", None)
        version = _version(x)
        if left is None or left[0] is not self.fused.qweight or left[1] != version:
            columns: tuple[Tensor, ...] = torch.split(self.fused(x), self.sizes, -1)
        else:
            columns = left[2]
        # The first one always multiplies and the last one clears up: an x that is written to and used again meets no
        # columns of its former content.
        if self.index == 0:
            # Known by its weight: to a tracer of torch.export, a module is another object at each access.
            x._exllama_columns = (self.fused.qweight, version, columns)  # type: ignore[attr-defined]
        elif self.index == len(self.sizes) - 1:
            x._exllama_columns = None  # type: ignore[attr-defined]
        return columns

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _version(x: Tensor) -> int | None:
    """Another one after each write to x, where torch counts them."""
    # Dynamo would make the count a value of the graph, which a comparison breaks.
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


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
