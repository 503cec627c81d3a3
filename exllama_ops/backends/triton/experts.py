"""The rows and the weight of one program among those of all experts. The host knows M and E alone, and no offset.

The rows before the first offset and those from the last one on belong to no expert. With them, the rows of x are
E + 2 runs, some of which are empty. Each run has tiles of its own, numbered from the first run to the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from exllama_ops.backends.triton.unpack import block_values, block_words


def row_tiles(M: int, E: int, block_m: int) -> int:
    """The most tiles of ``block_m`` rows that M > 0 rows may have, whatever the offsets are; E = 0 for one weight."""
    runs = min(E + 2 if E else 1, M)
    return runs + (M - runs) // block_m


@triton.constexpr_function
def power_of_2(count: int) -> int:
    return triton.next_power_of_2(count)


@triton.jit
def rows_of_tile(
    expert_offsets_ptr: tl.tensor, tile: tl.tensor, M: tl.tensor, E: tl.constexpr, BLOCK_M: tl.constexpr
) -> tl.tuple:
    """The expert of a tile, -1 for none, its first row, and the row after the last of that expert.

    A tile behind all others has no rows. Offsets that decrease, or leave [0, M], stop the kernel.
    """
    runs = tl.arange(0, power_of_2(E + 2))
    starts = tl.load(expert_offsets_ptr + runs - 1, (runs > 0) & (runs <= E + 1), 0)
    starts = tl.where(runs > E + 1, M, starts)
    stops = tl.load(expert_offsets_ptr + runs, runs <= E, M)
    tl.device_assert(starts <= stops, "expert_offsets decrease, or one leads outside")
    tiles_up_to = tl.cumsum(tl.cdiv(stops - starts, BLOCK_M))
    is_before = tiles_up_to <= tile
    run = tl.sum(is_before.to(tl.int32))
    first_tile = tl.max(tl.where(is_before, tiles_up_to, 0))
    start = tl.max(tl.where(is_before, stops, 0))
    stop = tl.min(tl.where(is_before, M, stops))
    return tl.where(run <= E, run - 1, -1), start + (tile - first_tile).to(tl.int64) * BLOCK_M, stop


@triton.jit
def place_of(
    expert_offsets_ptr: tl.tensor,
    program: tl.tensor,
    row_tiles: tl.tensor,
    splits: tl.tensor,
    M: tl.tensor,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tuple:
    """The split, the tile of rows, the expert, the first row and the row after the last, of a program for some columns.

    One weight has a program for each tile of rows and each split, in this order. Experts have it the other way round:
    programs without rows come last.
    """
    if E == 0:
        tile = program % row_tiles
        return program // row_tiles, tile, 0, tile.to(tl.int64) * BLOCK_M, M
    else:
        tile = program // splits
        return (program % splits, tile) + rows_of_tile(expert_offsets_ptr, tile, M, E, BLOCK_M)


@triton.jit
def pointers_of(
    expert: tl.tensor,
    qweight_ptr: tl.tensor,  # (E, K * BITS / 32, N)
    qzeros_ptr: tl.tensor,  # (E, G, N * BITS / 32)
    scales_ptr: tl.tensor,  # (E, G, N)
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tuple:
    """The words, zero points and scales of an expert in their stacks."""
    expert = expert.to(tl.int64)
    qweight_ptr += expert * (K // block_values(BITS) * block_words(BITS)) * N
    qzeros_ptr += expert * G * (N.to(tl.int64) * BITS // 32)
    scales_ptr += expert * G * N
    return qweight_ptr, qzeros_ptr, scales_ptr
