"""Device functions that every kernel shares: from words, zero points and scales to weights.

A tile of words is a tuple of ``block_words(bits)`` tensors, [BLOCK_B, BLOCK_N] each: BLOCK_B blocks of BLOCK_N columns.
Value J of its blocks is known by number when a kernel is compiled. So `exllama_ops.layout.formats` says where its bits
lie, for either order, and reading them costs a shift and an AND.

GROUPS_OF says how far a group of rows reaches in a tile, and so where zero points and scales are loaded. With "tile"
all of it lies in one group, with "block" each block does, and with "row" any row may be of another group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from exllama_ops.layout.formats import FORMATS, Field

# With the exponent of 2**23, the bits of an integer below 2**23 are the float32 2**23 + that integer.
FLOAT_OF_BITS: tl.constexpr = tl.constexpr(0x4B000000)
FLOAT_OFFSET: tl.constexpr = tl.constexpr(8388608.0)


@triton.constexpr_function
def block_values(bits: int) -> int:
    return FORMATS[bits].block_values


@triton.constexpr_function
def block_words(bits: int) -> int:
    return FORMATS[bits].block_words


@triton.constexpr_function
def fields_of(bits: int, shuffled: bool, value: int) -> list[Field]:
    return [field for field in FORMATS[bits].fields("shuffled" if shuffled else "checkpoint") if field.value == value]


@triton.constexpr_function
def num_fields(bits: int, shuffled: bool, value: int) -> int:
    return len(fields_of(bits, shuffled, value))


@triton.constexpr_function
def field_word(bits: int, shuffled: bool, value: int, i: int) -> int:
    return fields_of(bits, shuffled, value)[i].word


@triton.constexpr_function
def field_shift(bits: int, shuffled: bool, value: int, i: int) -> int:
    return fields_of(bits, shuffled, value)[i].shift


@triton.constexpr_function
def field_mask(bits: int, shuffled: bool, value: int, i: int) -> int:
    return fields_of(bits, shuffled, value)[i].mask


@triton.constexpr_function
def field_low_bit(bits: int, shuffled: bool, value: int, i: int) -> int:
    return fields_of(bits, shuffled, value)[i].low_bit


@triton.jit
def load_words(
    qweight_ptr: tl.tensor, blocks: tl.tensor, offs_n: tl.tensor, mask: tl.tensor, N: tl.tensor, BITS: tl.constexpr
) -> tl.tuple:
    """The words of ``blocks`` (BLOCK_B,) and columns ``offs_n`` (BLOCK_N,); zeros where ``mask`` is not set."""
    ptrs = qweight_ptr + (blocks.to(tl.int64) * (block_words(BITS) * N))[:, None] + offs_n[None, :]
    if block_words(BITS) == 3:
        return tl.load(ptrs, mask, 0), tl.load(ptrs + N, mask, 0), tl.load(ptrs + 2 * N, mask, 0)
    else:
        tl.static_assert(block_words(BITS) == 1, "load_words has no blocks of this many words")
        return (tl.load(ptrs, mask, 0),)


@triton.jit
def value_of(words: tl.tuple, BITS: tl.constexpr, SHUFFLED: tl.constexpr, J: tl.constexpr) -> tl.tensor:
    """Value J of each block, int32."""
    word = words[field_word(BITS, SHUFFLED, J, 0)]
    value = (word >> field_shift(BITS, SHUFFLED, J, 0)) & field_mask(BITS, SHUFFLED, J, 0)
    for i in tl.static_range(1, num_fields(BITS, SHUFFLED, J)):
        field = words[field_word(BITS, SHUFFLED, J, i)] >> field_shift(BITS, SHUFFLED, J, i)
        value |= (field & field_mask(BITS, SHUFFLED, J, i)) << field_low_bit(BITS, SHUFFLED, J, i)
    return value


@triton.jit
def checked_rows(
    row_order_ptr: tl.tensor, k: tl.tensor, mask: tl.tensor, limit: tl.tensor, FIRST: tl.constexpr = 0
) -> tl.tensor:
    """Entries ``k`` of a permutation or g_idx. One outside of [FIRST, limit) stops the kernel."""
    rows = tl.load(row_order_ptr + k, mask, 0)
    tl.device_assert((rows >= FIRST) & (rows < limit), "an index in g_idx or a permutation leads outside", mask)
    return rows


@triton.jit
def load_zeros(
    qzeros_ptr: tl.tensor,
    groups: tl.tensor,
    offs_n: tl.tensor,
    mask: tl.tensor,
    N: tl.tensor,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
) -> tl.tensor:
    """2**23 + z in float32, exact, [GROUPS, BLOCK_N]."""
    first_bit = offs_n.to(tl.int64) * BITS
    shift = (first_bit % 32).to(tl.uint32)[None, :]
    ptrs = qzeros_ptr + groups.to(tl.int64)[:, None] * (N.to(tl.int64) * BITS // 32) + (first_bit // 32)[None, :]
    field = tl.load(ptrs, mask, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        goes_on = shift > 32 - BITS
        rest = tl.load(ptrs + 1, mask & goes_on, 0).to(tl.uint32, bitcast=True)
        field |= tl.where(goes_on, rest << (32 - tl.where(goes_on, shift, 1)), 0)
    z = (field & ((1 << BITS) - 1)) + ZERO_OFFSET
    return z.to(tl.float32) + FLOAT_OFFSET


@triton.jit
def load_scales(
    scales_ptr: tl.tensor, groups: tl.tensor, offs_n: tl.tensor, mask: tl.tensor, N: tl.tensor
) -> tl.tensor:
    """Scales in float32, exact, [GROUPS, BLOCK_N]."""
    return tl.load(scales_ptr + groups.to(tl.int64)[:, None] * N + offs_n[None, :], mask, 0).to(tl.float32)


@triton.jit
def centered(q: tl.tensor, zeros: tl.tensor) -> tl.tensor:
    """q - z in float32, exact, from what `value_of` and `load_zeros` give; int-to-float conversions are slow."""
    return (q | FLOAT_OF_BITS).to(tl.float32, bitcast=True) - zeros


@triton.jit
def load_weights(
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    blocks: tl.tensor,
    offs_n: tl.tensor,
    mask_b: tl.tensor,
    mask_n: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    SCALED: tl.constexpr,
) -> tl.tuple:
    """The weights of a tile of blocks: value by value, float32 [BLOCK_B, BLOCK_N], and the scales.

    A weight is ``scale * (q - z)`` with one rounding if SCALED, else ``q - z``, exact. The scales are [1 or BLOCK_B,
    BLOCK_N], and in rows of many groups those of the last value.
    """
    tl.static_assert(SCALED or GROUPS_OF != "row")
    VALUES: tl.constexpr = block_values(BITS)
    mask = mask_b[:, None] & mask_n[None, :]
    words = load_words(qweight_ptr, blocks, offs_n, mask, N, BITS)
    if GROUPS_OF != "row":
        groups = blocks * VALUES // group_size
        mask_groups = mask
        if GROUPS_OF == "tile":
            groups = tl.min(groups, 0, keep_dims=True)
            mask_groups = mask_n[None, :]
        zeros = load_zeros(qzeros_ptr, groups, offs_n, mask_groups, N, BITS, ZERO_OFFSET)
        scales = load_scales(scales_ptr, groups, offs_n, mask_groups, N)
    weights = ()
    for j in tl.static_range(VALUES):
        if GROUPS_OF == "row":
            groups = (blocks * VALUES + j) // group_size
            if HAS_ROW_ORDER and not SHUFFLED:
                groups = checked_rows(row_order_ptr, blocks * VALUES + j, mask_b, G)
            zeros = load_zeros(qzeros_ptr, groups, offs_n, mask, N, BITS, ZERO_OFFSET)
            scales = load_scales(scales_ptr, groups, offs_n, mask, N)
        weight = centered(value_of(words, BITS, SHUFFLED, j), zeros)
        weights = weights + (weight * scales if SCALED else weight,)
    return weights, scales


@triton.jit
def interleave(values: tl.tuple, OPERAND: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    if len(values) == STRIDE:
        return values[FIRST].to(OPERAND)
    else:
        # A join adds the fastest axis, and the outermost one separates the even values from the odd ones.
        return tl.join(
            interleave(values, OPERAND, FIRST, 2 * STRIDE), interleave(values, OPERAND, FIRST + STRIDE, 2 * STRIDE)
        )


@triton.jit
def rows_of(values: tl.tuple, OPERAND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The rows of a tile from the values of its blocks: [BLOCK_B * VALUES, BLOCK_N], in the dtype OPERAND."""
    VALUES: tl.constexpr = len(values)
    tile = interleave(values, OPERAND, 0, 1).reshape(BLOCK_B, BLOCK_N, VALUES)
    return tile.permute(0, 2, 1).reshape(BLOCK_B * VALUES, BLOCK_N)
