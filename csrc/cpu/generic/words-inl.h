// Words of a shuffled weight to integers, in a strip of kStrip columns: what panels and products of few rows share.
//
// Everything in generic/ is written once, over the vocabulary of an ISA: isa/<name>/vocabulary-inl.h, which is included
// before it. A vocabulary defines the types Int, Float, Mask, Short, Bytes and PairSum with the functions on them. Its
// constants are kStrip (the lanes of 32 bits), kTallRows, kWideRows, kFloatStrips, kGemvVectors and kSignedDots. Its macro
// EXLLAMA_VECTOR is the target attribute of all code over it. All of this stands in the anonymous namespace of each source
// that includes it.
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

// Where a value may stay while it is multiplied: `place` values above the lowest bits, so that it counts 2^(bits * place)
// times. With more than one place, fewer shifts do. The sums of each place are kept apart and shifted back at the end of
// a span. That is exact: the largest weights are 3 << 6, 7 << 6 and 15 << 4, and with the rows of their place and int16
// they sum to less than 2^29.
constexpr int most_places_of_pairs(int bits) { return bits == 8 ? 1 : 8 / bits + bits % 2; }
constexpr int most_places_of_quads(int bits) { return bits == 2 || bits == 4 ? (kSignedDots ? 7 : 8) / bits : 1; }
// A word of 3 bits has five whole pairs; the sixteenth of a block is no field.
template <int bits, int places>
constexpr int place_of_pair(int p) {
  if (bits == 3) return p < 15 ? p % 5 % places : 0;
  return p % places;
}
template <int bits, int places>
constexpr int place_of_quad(int p) {
  return p % places;
}

// Rows 2 p and 2 p + 1 of a block, in 16 bits each, at place_of_pair.
template <int bits, int places = 1>
EXLLAMA_VECTOR_INLINE Int pair_of(const Int* words, int p) {
  const int place = place_of_pair<bits, places>(p);
  if constexpr (bits == 8) {
    return byte_pair(words[0], p);
  } else if constexpr (bits == 3) {
    if (p < 15) return bit_and(shift_right(words[p / 5], 3 * (p % 5 - place)), set_int(0x00070007 << 3 * place));
    // Bit b of the last pair is bits 15 and 31 of word b.
    const Int bit = set_int(0x00010001);
    const Int b0 = bit_and(shift_right(words[0], 15), bit);
    const Int b1 = bit_and(shift_right(words[1], 14), shift_left(bit, 1));
    const Int b2 = bit_and(shift_right(words[2], 13), shift_left(bit, 2));
    return bit_or(bit_or(b0, b1), b2);
  } else if constexpr (bits == 2 || bits == 4) {
    const int field = bits == 4 ? 0x000f000f : 0x00030003;
    return bit_and(shift_right(words[0], bits * (p - place)), set_int(field << bits * place));
  } else {
    static_assert(kHasWidth<bits>, "csrc/cpu has no unpacking of this bit width: add it to pair_of in words-inl.h");
  }
}

// The p-th four rows of a block in the order of quad_order, in 8 bits each, at place_of_quad.
template <int bits, int places = 1>
EXLLAMA_VECTOR_INLINE Int quad_of(const Int* words, int p) {
  if constexpr (bits == 8) {
    return words[0];
  } else if constexpr (bits == 3) {
    return bit_or(pair_of<bits>(words, 2 * p), shift_left(pair_of<bits>(words, 2 * p + 1), 8));
  } else if constexpr (bits == 2 || bits == 4) {
    const int place = place_of_quad<bits, places>(p);
    const uint32_t field = bits == 4 ? 0x0f0f0f0f : 0x03030303;
    return bit_and(shift_right(words[0], bits * (p - place)), set_int(static_cast<int32_t>(field << bits * place)));
  } else {
    static_assert(kHasWidth<bits>, "csrc/cpu has no quads of this bit width: add them to quad_of in words-inl.h");
  }
}

// The zero points of a strip of columns of a group, whose first is a multiple of 4. `words` are those from the word on
// that the first column begins in. A field lies in one word or goes on in the next, so this is right for every width.
template <int bits>
EXLLAMA_VECTOR_INLINE Int zeros_of_words(const Weight& weight, int64_t column, Int words) {
  Int position = multiply_int32(lanes(), set_int(bits));
  if (kStrip * bits % 32 != 0) position = add_int32(position, set_int(column * bits % 32));
  const Int word = shift_right(position, 5), shift = bit_and(position, set_int(31));
  Int stored = shift_right(permute(words, word), shift);
  if (32 % bits != 0) {
    // A shift by 32 gives zero.
    const Int high = shift_left(permute(words, add_int32(word, set_int(1))), sub_int32(set_int(32), shift));
    stored = bit_or(stored, high);
  }
  return add_int32(bit_and(stored, set_int((1 << bits) - 1)), set_int(weight.zero_offset));
}

inline const uint32_t* zeros_of(const Weight& weight, int64_t group, int64_t column) {
  return weight.qzeros + group * (weight.N * weight.bits / 32) + column * weight.bits / 32;
}

// A strip with all of its columns. Then no other word is read than the strip has.
template <int bits>
EXLLAMA_VECTOR_INLINE Int zeros_of_whole_strip(const Weight& weight, int64_t group, int64_t column) {
  const Mask mask = mask_of((column * bits % 32 + kStrip * bits + 31) / 32);
  return zeros_of_words<bits>(weight, column, load_int_masked(zeros_of(weight, group, column), mask));
}

// As many columns as there are. Lanes beyond them are zero.
template <int bits>
EXLLAMA_VECTOR_INLINE Int zeros_of_strip(const Weight& weight, int64_t group, int64_t column, int64_t columns) {
  if (columns <= 0) return set_int(0);
  const Mask there = mask_of(weight.N * bits / 32 - column * bits / 32);
  const Int words = load_int_masked(zeros_of(weight, group, column), there);
  return keep(mask_of(columns), zeros_of_words<bits>(weight, column, words));
}

}  // namespace
}  // namespace exllama::cpu
