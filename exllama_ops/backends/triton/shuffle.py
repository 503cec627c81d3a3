"""gptq_shuffle and gptq_unshuffle: rows are permuted in checkpoint order, the bits of each block reordered apart."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.launch import launch
from exllama_ops.backends.triton.tiles import check_width
from exllama_ops.backends.triton.unpack import (
    block_values,
    block_words,
    checked_rows,
    field_low_bit,
    field_mask,
    field_shift,
    field_word,
    load_words,
    num_fields,
    value_of,
)
from exllama_ops.layout.checks import check_gptq_shuffle, check_gptq_unshuffle
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.shuffle import inverse_permutation

BLOCK_B, BLOCK_N = 2, 64


@triton.jit
def insert_value(
    words: tl.tuple, value: tl.tensor, BITS: tl.constexpr, SHUFFLED: tl.constexpr, J: tl.constexpr
) -> tl.tuple:
    """The words with value J put where its bits are 0."""
    result = ()
    for w in tl.static_range(block_words(BITS)):
        word = words[w]
        for i in tl.static_range(num_fields(BITS, SHUFFLED, J)):
            if field_word(BITS, SHUFFLED, J, i) == w:
                field = (value >> field_low_bit(BITS, SHUFFLED, J, i)) & field_mask(BITS, SHUFFLED, J, i)
                word |= field << field_shift(BITS, SHUFFLED, J, i)
        result = result + (word,)
    return result


@triton.jit
def value_at(
    in_ptr: tl.tensor, rows: tl.tensor, offs_n: tl.tensor, mask: tl.tensor, N: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Values of any rows of words in checkpoint order, a stream of bits down each column."""
    first_bit = rows.to(tl.int64)[:, None] * BITS
    ptrs = in_ptr + first_bit // 32 * N + offs_n[None, :]
    shift = (first_bit % 32).to(tl.uint32)
    value = tl.load(ptrs, mask, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        goes_on = shift > 32 - BITS
        rest = tl.load(ptrs + N, mask & goes_on, 0).to(tl.uint32, bitcast=True)
        value |= tl.where(goes_on, rest << (32 - tl.where(goes_on, shift, 1)), 0)
    return (value & ((1 << BITS) - 1)).to(tl.int32, bitcast=True)


@triton.jit
def reorder_kernel(
    in_ptr: tl.tensor,  # (K * BITS / 32, N)
    row_order_ptr: tl.tensor,  # (K,): the row of the input that each row of the output is; or empty
    out_ptr: tl.tensor,  # like in_ptr; may be it if there are no rows
    K: tl.tensor,
    N: tl.tensor,
    BITS: tl.constexpr,
    FROM_SHUFFLED: tl.constexpr,
    TO_SHUFFLED: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    WORDS: tl.constexpr = block_words(BITS)
    tl.static_assert(not (HAS_ROW_ORDER and FROM_SHUFFLED))
    column_tiles = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = tl.program_id(0) // column_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = blocks < K // VALUES
    mask = mask_b[:, None] & (offs_n < N)[None, :]
    zero = tl.zeros((BLOCK_B, BLOCK_N), tl.int32)
    result = (zero, zero, zero) if block_words(BITS) == 3 else (zero,)
    if not HAS_ROW_ORDER:
        words = load_words(in_ptr, blocks, offs_n, mask, N, BITS)
    for j in tl.static_range(VALUES):
        if HAS_ROW_ORDER:
            rows = checked_rows(row_order_ptr, blocks * VALUES + j, mask_b, K)
            value = value_at(in_ptr, rows, offs_n, mask, N, BITS)
        else:
            value = value_of(words, BITS, FROM_SHUFFLED, j)
        result = insert_value(result, value, BITS, TO_SHUFFLED, j)
    for w in tl.static_range(WORDS):
        ptrs = out_ptr + (blocks.to(tl.int64) * WORDS + w)[:, None] * N + offs_n[None, :]
        tl.store(ptrs, result[w], mask)


def _reorder(words: Tensor, rows: Tensor, out: Tensor, bits: int, *, from_shuffled: bool, to_shuffled: bool) -> None:
    N = words.shape[1]
    if N == 0:
        return
    blocks = words.shape[0] // FORMATS[bits].block_words
    constants = {
        "BITS": bits, "FROM_SHUFFLED": from_shuffled, "TO_SHUFFLED": to_shuffled, "HAS_ROW_ORDER": rows.shape[0] > 0,
        "BLOCK_B": BLOCK_B, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    launch(
        reorder_kernel,
        (triton.cdiv(blocks, BLOCK_B) * triton.cdiv(N, BLOCK_N),),
        {"in_ptr": words, "row_order_ptr": rows, "out_ptr": out},
        {"K": blocks * FORMATS[bits].block_values, "N": N},
        constants,
    )


def gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """`torch.ops.exllama.gptq_shuffle` in Triton."""
    check_gptq_shuffle(qweight, q_perm, bit)
    check_width("gptq_shuffle", bit)
    words = qweight.clone() if q_perm.shape[0] else qweight
    _reorder(words, q_perm, qweight, bit, from_shuffled=False, to_shuffled=True)


def gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> Tensor:
    """`torch.ops.exllama.gptq_unshuffle` in Triton."""
    check_gptq_unshuffle(qweight, q_perm, bit)
    check_width("gptq_unshuffle", bit)
    in_order = qweight.new_empty(qweight.shape)
    none = q_perm[:0]
    _reorder(qweight, none, in_order, bit, from_shuffled=True, to_shuffled=False)
    if not q_perm.shape[0]:
        return in_order
    out = qweight.new_empty(qweight.shape)
    rows = inverse_permutation(q_perm).to(q_perm.dtype)
    _reorder(in_order, rows, out, bit, from_shuffled=False, to_shuffled=False)
    return out
