"""Nested tensors: their components side by side in one tensor, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def values_of(x: Any, K: int) -> Tensor:
    """The values of a nested x, (sum of the ragged sizes, *, K), for a layer that takes rows.

    Raises:
        ValueError: x is not nested with layout=torch.jagged, or its last size is not K.
    """
    if not x.is_nested:
        raise ValueError(f"ExllamaLinear: x must be dense, of layout torch.strided; got {x.layout}")
    if x.layout is not torch.jagged:
        raise ValueError(
            f"ExllamaLinear: a nested x must have layout torch.jagged; got {x.layout}. "
            "torch.nested.as_nested_tensor(x.unbind(), layout=torch.jagged) makes one of it"
        )
    if x.shape[-1] != K:
        raise ValueError(f"ExllamaLinear: x must have shape (*, K) with K={K}; got {tuple(x.shape)}")
    values: Tensor = x.values()
    return values


def nested_like(x: Any, values: Tensor) -> Tensor:
    """Other values with the offsets of x: what else has its ragged size can be added to the result."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        x.offsets(),
        x.lengths(),
        jagged_dim=x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )
