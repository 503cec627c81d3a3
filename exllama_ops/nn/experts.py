"""The sum over the experts that each token chose: by products of all experts at once, or expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from exllama_ops.layout.weight import GptqWeight
from exllama_ops.nn.linear import ExllamaLinear
from exllama_ops.nn.packed_experts import PackedExperts


class ExllamaExperts(nn.Module):
    """``y[t] = sum over c of weights[t, c] * down(act(gate(x)) * up(x))`` of the expert ``ids[t, c]`` of each token.

    A router says which experts a token takes, and experts that every token takes stand beside this module. It runs
    in graphs: the host does not read what the router says.

    Args:
        gate: the weight of each expert, (K, N) = (hidden, inner), or None for experts without a gate. A generator is
            asked for one weight at a time.
        up: likewise.
        down: likewise, of (inner, hidden).
        activation: of the gate, or of up where there is none.

    Attributes:
        gate: a layer for each expert, or None.
        up: likewise.
        down: likewise.

    Shape:
        x: (*, hidden); ids: (*, k) integers, of which those of no expert add nothing; weights: (*, k); y: (*, hidden)
        in x's dtype, summed in the dtype of weights.

    Raises:
        ValueError: the weights of a projection differ in more than their values; or see `PackedExperts`.
    """

    def __init__(
        self,
        gate: Iterable[GptqWeight] | None,
        up: Iterable[GptqWeight],
        down: Iterable[GptqWeight],
        activation: Callable[[Tensor], Tensor] = nn.functional.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = None if gate is None else _layers(gate)
        self.up, self.down = _layers(up), _layers(down)
        # After the layers, whose tensors they take.
        projections = (self.gate, self.up, self.down)
        lengths = [len(layers) for layers in projections if layers is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"ExllamaExperts: all projections must have as many experts; got {lengths}")
        self.stacks = nn.ModuleList(PackedExperts.of([*layers]) for layers in projections if layers is not None)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.up)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        def experts(rows: Tensor, offsets: Tensor, own: Tensor) -> Tensor:
            *into, down = self.stacks
            inner = self.activation(into[0](rows, offsets, own))
            if len(into) == 2:
                inner = inner * into[1](rows, offsets, own)
            y: Tensor = down(inner, offsets, own)
            return y

        k = ids.shape[-1]
        rows = x.reshape(-1, x.shape[-1])
        y = sum_of_sorted_rows(rows, ids.reshape(-1, k), weights.reshape(-1, k), self.num_experts, experts)
        return y.view(x.shape)


def _layers(weights: Iterable[GptqWeight]) -> nn.ModuleList:
    return nn.ModuleList(ExllamaLinear.from_weight(weight) for weight in weights)


def sum_of_sorted_rows(
    x: Tensor, ids: Tensor, weights: Tensor, E: int, experts: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """``y[t] = sum over c of weights[t, c] * expert(ids[t, c])(x[t])``, by one call for the rows of all experts.

    The results of a token are added in the order of its choices, so they do not depend on the tokens beside it. The
    host reads nothing of ids, so that it runs in graphs.

    Args:
        x: (tokens, hidden).
        ids: (tokens, k) integers, the experts of each token. Those outside [0, E) are no experts and add nothing.
        weights: (tokens, k), in the dtype of the sum.
        E: how many experts there are.
        experts: takes rows (tokens * k, hidden) sorted by expert, the offsets of the experts (E + 1,) int32, and the
            expert of each row. It gives (tokens * k, hidden), with 0 in the rows of no expert.

    Returns:
        (tokens, hidden) in the dtype of x.
    """
    tokens, k = ids.shape
    own, order = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(E + 1, dtype=own.dtype, device=own.device)
    offsets = torch.searchsorted(own, bounds, out_int32=True)
    results = experts(x.index_select(0, order // k), offsets, own)
    places = order.argsort()
    results = results.index_select(0, places).view(tokens, k, results.shape[-1])
    return (results * weights.unsqueeze(-1)).to(weights.dtype).sum(1).to(x.dtype)


def sum_of_experts(x: Tensor, ids: Tensor, weights: Tensor, expert: Callable[[int, Tensor], Tensor | None]) -> Tensor:
    """The sum of `sum_of_sorted_rows`, with a call of each expert that any token chose.

    It serves experts whose weights cannot be in stacks. Which experts are chosen is read on the host: it runs eagerly,
    and not in a CUDA graph.

    Args:
        x: (tokens, hidden).
        ids: (tokens, k) integers, the experts of each token.
        weights: (tokens, k), in the dtype of the sum.
        expert: takes the number of an expert and rows (n, hidden) for it, and gives (n, hidden); or None for an expert
            that is not here, which adds nothing.

    Returns:
        (tokens, hidden) in the dtype of x.
    """
    results = x.new_zeros(*ids.shape, x.shape[-1], dtype=weights.dtype)
    for index in ids.unique().tolist():
        token, choice = (ids == index).nonzero(as_tuple=True)
        y = expert(index, x[token])
        if y is not None:
            results[token, choice] = (y * weights[token, choice].unsqueeze(-1)).to(weights.dtype)
    return results.sum(1).to(x.dtype)
