"""What the kernels are given of a `Weight` or of `Experts`: pointers, sizes, and what is compiled into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.experts import Experts
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.weight import Weight


def pointers(weight: Weight | Experts) -> dict[str, Tensor]:
    """The tensors of every kernel that computes with one weight, or with one weight of each expert."""
    return {f"{name}_ptr": getattr(weight, name) for name in Weight.TENSORS}


def sizes(weight: Weight) -> dict[str, int]:
    """The sizes of every kernel that computes with weights."""
    return {"K": weight.K, "N": weight.N, "G": weight.G, "group_size": weight.rows_per_group}


def constants(weight: Weight) -> dict[str, Any]:
    """What is compiled into every kernel that computes with weights."""
    return {
        "BITS": weight.bits,
        "SHUFFLED": weight.shuffled,
        "ZERO_OFFSET": weight.zero_offset,
        "HAS_ROW_ORDER": weight.row_order.shape[0] > 0,
    }


def offsets_of(experts: Experts | None) -> dict[str, Tensor]:
    """What the kernels of products are given of a mixture beside its stacks; nothing for one weight."""
    return {"expert_offsets_ptr": experts.offsets} if experts else {}


def constants_of_experts(experts: Experts | None) -> dict[str, Any]:
    """What is compiled into the kernels of products for a mixture, and for one weight."""
    if experts is None:
        return {"expert_offsets_ptr": None, "E": 0}
    return {"E": experts.E}


def groups_of(weight: Weight, tile_rows: int) -> str:
    """How far a group reaches in a tile of ``tile_rows`` rows: GROUPS_OF in `unpack`."""
    if weight.g_idx is not None:
        return "row"
    size = weight.rows_per_group
    if size == weight.K or size % tile_rows == 0:
        return "tile"
    return "block" if size % FORMATS[weight.bits].block_values == 0 else "row"


def without_order(weight: Weight) -> Weight:
    """The words of a filled weight as a weight of their own, for an x that has a column for each of their rows."""
    return replace(weight, row_order=weight.row_order[:0])


def new_rows(weight: Weight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory for a result whose rows or columns are those of the checkpoint.

    It is NaN where there is a permutation: what a list with duplicates does not name must not be old memory.
    """
    if weight.perm is None:
        return weight.scales.new_empty(shape, dtype=dtype)
    return weight.scales.new_full(shape, torch.nan, dtype=dtype)
