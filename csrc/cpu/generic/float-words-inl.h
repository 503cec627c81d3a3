// Words of a shuffled weight to floats in registers, which are multiplied as they come.
//
// A row of a block becomes q - z by two operations. First q is put into a byte of a power of two whose bits count 1
// from there on: the last byte of 2^23, the second last of 2^15, or the third last of 2^7. The sum is exact, and so is
// the difference to the same power of two with the zero point.
#pragma once

#include "cpu/generic/words-inl.h"

namespace exllama::cpu {
namespace {

// The byte of a lane that the odd row of a pair lies in. The even one lies in byte 0.
template <int bits>
constexpr int kOddByte = bits == 8 ? 1 : 2;

// Rows 2 p and 2 p + 1 of a block, each alone in its byte. The other two bytes hold anything.
template <int bits>
EXLLAMA_VECTOR_INLINE Int bytes_of_pair(const Int* words, int p) {
  if constexpr (bits == 8) {
    return shift_right(words[0], 16 * p);
  } else if constexpr (bits == 3) {
    return pair_of<bits>(words, p);
  } else if constexpr (bits == 2 || bits == 4) {
    // A quad has the pair of its first and third byte, and that of the others, half a block on.
    constexpr int kQuads = layout::block_values(bits) / 4;
    return p < kQuads ? quad_of<bits>(words, p) : shift_right(quad_of<bits>(words, p - kQuads), 8);
  } else {
    static_assert(kHasWidth<bits>,
                  "csrc/cpu has no floats of this bit width: add it to bytes_of_pair in float-words-inl.h");
  }
}

// The number whose bits count 1 from this byte on.
constexpr float one_at(int byte) { return static_cast<float>(1 << (23 - 8 * byte)); }

// What is subtracted from the even and the odd rows of a strip of columns.
struct FloatZeros {
  Float even, odd;
};

template <int bits>
EXLLAMA_VECTOR_INLINE FloatZeros float_zeros(Int zeros) {
  const Float zero = to_float(zeros);
  return {subtract(zero, set_float(-one_at(0))), subtract(zero, set_float(-one_at(kOddByte<bits>)))};
}

template <int byte>
EXLLAMA_VECTOR_INLINE Float centered(Int bytes, Float zero) {
  return subtract(as_float(byte_into<byte>(bytes, as_int(set_float(one_at(byte))))), zero);
}

// mr rows of x, `stride` apart: every third has a pointer, and index registers reach the two that follow it.
template <int mr>
struct RowsOfX {
  const float* base[(mr + 2) / 3];
  int64_t stride;

  EXLLAMA_VECTOR_INLINE RowsOfX(const float* x, int64_t row_stride) : stride(row_stride) {
#pragma GCC unroll 4
    for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  }
  EXLLAMA_VECTOR_INLINE Float spread(int m, int k) const { return set_float(base[m / 3][m % 3 * stride + k]); }
};

// sum[m][v] = fma(x, q - z, sum[m][v]) for the rows of a block of words, in ascending order. Those of x begin at k.
template <int bits, int mr, int nr>
EXLLAMA_VECTOR_INLINE void add_block(const Int (&words)[nr][layout::block_words(bits)], const FloatZeros (&zeros)[nr],
                                     const RowsOfX<mr>& x, int k, Float (&sum)[mr][nr]) {
  constexpr int kPairs = layout::block_values(bits) / 2;
#pragma GCC unroll 16
  for (int p = 0; p < kPairs; ++p) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      Float weight[nr];
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) {
        const Int bytes = bytes_of_pair<bits>(words[v], p);
        weight[v] = odd ? centered<kOddByte<bits>>(bytes, zeros[v].odd) : centered<0>(bytes, zeros[v].even);
      }
#pragma GCC unroll 12
      for (int m = 0; m < mr; ++m) {
        const Float value = x.spread(m, k + 2 * p + odd);
#pragma GCC unroll 4
        for (int v = 0; v < nr; ++v) fma_into(sum[m][v], weight[v], value);
      }
    }
  }
}

}  // namespace
}  // namespace exllama::cpu
