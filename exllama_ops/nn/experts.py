"""The sum over the experts that each token chose, with one call of each expert that any token chose."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def sum_of_experts(x: Tensor, ids: Tensor, weights: Tensor, expert: Callable[[int, Tensor], Tensor | None]) -> Tensor:
    """``y[t] = sum over c of weights[t, c] * expert(ids[t, c])(x[t])``.

    The results of a token are added in the order of its choices, so they do not depend on the tokens beside it. Which
    experts are chosen is read on the host: it runs eagerly, and not in a CUDA graph.

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
            results[token, choice] = y * weights[token, choice].unsqueeze(-1)
    return results.sum(1).to(x.dtype)
