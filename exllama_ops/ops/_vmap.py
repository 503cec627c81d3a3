"""torch.vmap of the ops: what a batch becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

# A rule takes an op, the size of the batch, the dimension of each argument that counts the samples (None for none), and
# the arguments. It gives the results of all samples in one tensor, and the dimension that counts them there.


def in_one_call(op: Callable[..., Tensor], batch_size: int, dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """The rule of an op that is linear in the rows of its first argument: one call takes the rows of all samples."""
    (first, *weight), (first_dim, *weight_dims) = args, dims
    if first_dim is None or first.dim() != 3 or any(dim is not None for dim in tree_leaves(weight_dims)):
        return one_by_one(op, batch_size, dims, *args)
    first = first.movedim(first_dim, 0)
    result = op(first.flatten(0, 1).contiguous(), *weight)
    return result.unflatten(0, first.shape[:2]), 0


def one_by_one(op: Callable[..., Tensor], batch_size: int, dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """The rule of an op that knows no batches: a call for each sample."""
    if batch_size:
        return torch.stack([op(*sample) for sample in _samples(batch_size, dims, args)]), 0
    # No sample shows what a result is. The fake does, of one that has no data.
    values, structure = tree_flatten(args)
    one = [
        value.new_empty((1, *value.movedim(dim, 0).shape[1:])).movedim(0, dim) if dim is not None else value
        for value, dim in zip(values, tree_leaves(dims), strict=True)
    ]
    meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), one)
    result, _ = one_by_one(op, 1, dims, *tree_unflatten(meta, structure))
    return torch.empty_like(result[:0], device=values[0].device), 0


def _samples(batch_size: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """The arguments of each sample, contiguous as the ops want them wherever the batch was counted."""
    values, structure = tree_flatten(args)
    columns = [
        [value] * batch_size if dim is None else [sample.contiguous() for sample in value.unbind(dim)]
        for value, dim in zip(values, tree_leaves(dims), strict=True)
    ]
    return [tree_unflatten(list(sample), structure) for sample in zip(*columns, strict=True)]
