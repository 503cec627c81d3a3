"""The end of a product whose K is split: the partials of a tile are added up by its last program, or by a kernel.

Both add from the first split to the last. So they give the same bits, whichever program is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.launch import launch

# Parts of a gptq_gemm_multi in one launch: q, k and v, or gate and up. The kernels' arguments are counted by it.
PARTS = 4
ADD_BLOCK = 256
# Partials of a number whose loads are under way at once.
LOADS: tl.constexpr = tl.constexpr(4)


@triton.jit
def sum_of(values: tl.tuple) -> tl.tensor:
    total = values[0]
    for i in tl.static_range(1, len(values)):
        total += values[i]
    return total


@triton.jit
def is_last_of_splits(tickets_ptr: tl.tensor, tile: tl.tensor, splits: tl.tensor) -> tl.tensor:
    """Whether this program is the last one of its tile, and sees what the others have stored.

    The last one leaves the ticket 0, for the next launch.
    """
    tl.debug_barrier()  # all threads have stored: one of them takes the ticket, and so releases what all have stored
    is_last = tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    tl.store(tickets_ptr + tile, 0, is_last)
    return is_last


@triton.jit
def sum_of_splits(ptrs: tl.tensor, mask: tl.tensor, splits: tl.tensor, elements: tl.tensor) -> tl.tensor:
    """The sum of partials that lie ``elements`` apart, in L2, where other processors have written them."""
    total = tl.zeros(mask.shape, tl.float32)
    for first in range(0, splits, LOADS):
        partials = ()
        for i in tl.static_range(LOADS):
            split = tl.minimum(first + i, splits - 1)
            partials = partials + (tl.load(ptrs + split * elements, mask, 0, cache_modifier=".cg"),)
        for i in tl.static_range(LOADS):
            total = tl.where(first + i < splits, total + partials[i], total)
    return total


@triton.jit
def store_tile(
    out_ptr: tl.tensor,  # (M, columns)
    partials_ptr: tl.tensor,  # (splits, M, columns), None if K is not split
    tickets_ptr: tl.tensor,  # (tiles,), None if K is not split, or if another kernel adds the partials up
    sums: tl.tensor,
    offs_m: tl.tensor,
    columns_of_n: tl.tensor,
    mask: tl.tensor,
    M: tl.tensor,
    columns: tl.tensor,
    tile: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
) -> None:
    """Store the sums of a split at rows ``offs_m`` and ``columns_of_n``; a tile's last program stores the result."""
    offs = offs_m[:, None] * columns + columns_of_n[None, :]
    elements = M.to(tl.int64) * columns
    if partials_ptr is None:
        tl.store(out_ptr + offs, sums.to(out_ptr.dtype.element_ty), mask)
    else:
        rows = split.to(tl.int64) * M + offs_m
        tl.store(partials_ptr + rows[:, None] * columns + columns_of_n[None, :], sums, mask)
    if tickets_ptr is not None:  # noqa: SIM102 (it is known when the kernel is compiled)
        if is_last_of_splits(tickets_ptr, tile, splits):
            total = sum_of_splits(partials_ptr + offs, mask, splits, elements)
            tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["elements", "splits_0", "splits_1", "splits_2", "splits_3"])
def add_splits_kernel(
    partials_ptr: tl.tensor,  # (splits, M, all N), of which a part has only its own splits
    out_ptr: tl.tensor,  # (M, all N)
    elements: tl.tensor,
    N: tl.tuple,
    splits_0: tl.tensor,
    splits_1: tl.tensor,
    splits_2: tl.tensor,
    splits_3: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """out = the sum of each part's splits, always from the first to the last."""
    splits_of_part = (splits_0, splits_1, splits_2, splits_3)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    splits, most, end = tl.where(mask, splits_0, 0), splits_0, N[0]
    for i in tl.static_range(1, len(N)):
        is_later = mask & (offs % sum_of(N) >= end)
        splits = tl.where(is_later, splits_of_part[i], splits)
        most, end = tl.maximum(most, splits_of_part[i]), end + N[i]
    total = tl.load(partials_ptr + offs, mask, 0)
    ptrs = partials_ptr + offs
    for split in range(1, most):
        ptrs += elements
        total = tl.where(split < splits, total + tl.load(ptrs, split < splits, 0), total)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask)


def add_splits(partials: Tensor, out: Tensor, N: tuple[int, ...], splits: Sequence[int]) -> None:
    """out (M, all N) = the sums of ``partials`` (splits, M, all N), of which each part has its own number."""
    launch(
        add_splits_kernel,
        (triton.cdiv(out.numel(), ADD_BLOCK),),
        {"partials_ptr": partials, "out_ptr": out},
        {"elements": out.numel(), "N": N, **of_each_part("splits", splits)},
        {"BLOCK": ADD_BLOCK},
    )


def of_each_part(name: str, of_parts: Sequence[int]) -> dict[str, int]:
    """Arguments of their own: Triton would compile for what it sees in a tuple of integers."""
    return {f"{name}_{i}": of_parts[i] if i < len(of_parts) else 1 for i in range(PARTS)}


def arguments_of_splits(partials: Tensor | None, tickets: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that a kernel of products is given, and the constants for those that it is not given."""
    arguments = {"partials_ptr": partials, "tickets_ptr": tickets}
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    return given, {name: None for name in arguments if name not in given}
