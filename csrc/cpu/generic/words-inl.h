// Words of a shuffled weight to integers, in a strip of kStrip columns: what panels and products of few rows share.
//
// Everything in generic/ is written once, over the vocabulary of an ISA: isa/<name>/vocabulary-inl.h, which is included
// before it. A vocabulary defines the types Int, Float, Mask, Short, Bytes and PairSum with the functions on them. Its
// constants are kStrip (the lanes of 32 bits), kTallRows, kWideRows, kGemvVectors and kSignedDots. Its macro EXLLAMA_VECTOR is the
// target attribute of all code over it. All of this stands in the anonymous namespace of each source that includes it.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "layout/formats.h"

namespace exllama::cpu {
namespace {

// False, but not before the template is instantiated.
template <int bits>
constexpr bool kHasWidth = false;

// Four bytes in all lanes.
EXLLAMA_VECTOR_INLINE Int broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, sizeof value);
  return set_int(value);
}

EXLLAMA_VECTOR_INLINE Int both_halves(Int values) { return bit_or(values, shift_left(values, 16)); }

// The words of a block of values.
template <int bits>
EXLLAMA_VECTOR_INLINE void load_block(const uint32_t* block, int64_t N, Mask mask, Int* words) {
  constexpr int kWords = layout::block_words(bits);
#pragma GCC unroll 3
  for (int w = 0; w < kWords; ++w) words[w] = load_int_masked(block + w * N, mask);
}

// Rows 2 p and 2 p + 1 of a block, in 16 bits each.
template <int bits>
EXLLAMA_VECTOR_INLINE Int pair_of(const Int* words, int p) {
  if constexpr (bits == 8) {
    return byte_pair(words[0], p);
  } else if constexpr (bits == 3) {
    if (p < 15) return bit_and(shift_right(words[p / 5], p % 5 * 3), set_int(0x00070007));
    // Bit b of the last pair is bits 15 and 31 of word b.
    const Int bit = set_int(0x00010001);
    const Int b0 = bit_and(shift_right(words[0], 15), bit);
    const Int b1 = bit_and(shift_right(words[1], 14), shift_left(bit, 1));
    const Int b2 = bit_and(shift_right(words[2], 13), shift_left(bit, 2));
    return bit_or(bit_or(b0, b1), b2);
  } else if constexpr (bits == 2 || bits == 4) {
    return bit_and(shift_right(words[0], bits * p), set_int(bits == 4 ? 0x000f000f : 0x00030003));
  } else {
    static_assert(kHasWidth<bits>, "csrc/cpu has no unpacking of this bit width: add it to pair_of in words-inl.h");
  }
}

// The p-th four rows of a block in the order of quad_order, in 8 bits each.
template <int bits>
EXLLAMA_VECTOR_INLINE Int quad_of(const Int* words, int p) {
  if constexpr (bits == 8) {
    return words[0];
  } else if constexpr (bits == 3) {
    return bit_or(pair_of<bits>(words, 2 * p), shift_left(pair_of<bits>(words, 2 * p + 1), 8));
  } else if constexpr (bits == 2 || bits == 4) {
    return bit_and(shift_right(words[0], bits * p), set_int(bits == 4 ? 0x0f0f0f0f : 0x03030303));
  } else {
    static_assert(kHasWidth<bits>, "csrc/cpu has no quads of this bit width: add them to quad_of in words-inl.h");
  }
}

// The zero points of a strip of columns of a group. The column is a multiple of 4, and lanes off the mask are zero. A
// field lies in one word or goes on in the next, so this is right for every width.
template <int bits>
EXLLAMA_VECTOR_INLINE Int zeros_of_strip(const Weight& weight, int64_t group, int64_t column, int64_t columns) {
  if (columns <= 0) return set_int(0);
  const int64_t row_words = weight.N * bits / 32, first = column * bits / 32;
  const Int words = load_int_masked(weight.qzeros + group * row_words + first, mask_of(row_words - first));
  const Int position = add_int32(multiply_int32(lanes(), set_int(bits)), set_int(column * bits % 32));
  const Int word = shift_right(position, 5), from = bit_and(position, set_int(31));
  const Int low = shift_right(permute(words, word), from);
  // A shift by 32 gives zero.
  const Int high = shift_left(permute(words, add_int32(word, set_int(1))), sub_int32(set_int(32), from));
  const Int stored = bit_and(bit_or(low, high), set_int((1 << bits) - 1));
  return keep(mask_of(columns), add_int32(stored, set_int(weight.zero_offset)));
}

}  // namespace
}  // namespace exllama::cpu
