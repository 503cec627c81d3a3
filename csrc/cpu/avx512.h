// What the AVX-512 sources share: target attributes, dot products, unpacking of words.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"

#define EXLLAMA_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define EXLLAMA_AVX512_INLINE EXLLAMA_AVX512 inline __attribute__((always_inline))

namespace exllama::cpu {

namespace avx512 {
void gemv(const Gemv& gemv);
void gemv_vnni(const Gemv& gemv);
}  // namespace avx512

namespace {

// The first `count` of 16 lanes.
EXLLAMA_AVX512_INLINE __mmask16 mask_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

EXLLAMA_AVX512_INLINE __m512i broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, sizeof value);
  return _mm512_set1_epi32(value);
}

// sum += two int16 products. As assembler, since gcc 12 copies the sums of the intrinsic to and fro.
template <bool kVnni>
EXLLAMA_AVX512_INLINE void dot_int16(__m512i& sum, __m512i a, __m512i b) {
  if (kVnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
}

// sum += four products of unsigned a with signed b.
EXLLAMA_AVX512_INLINE void dot_int8(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

EXLLAMA_AVX512_INLINE __m512i both_halves(__m512i values) {
  return _mm512_or_si512(values, _mm512_slli_epi32(values, 16));
}

// A block of words of a shuffled weight, 16 columns, as pairs: pair[p] has rows 2 p and 2 p + 1 as 16-bit lanes.
template <int kBits>
EXLLAMA_AVX512_INLINE void split_pairs(const __m512i* words, __m512i* pair) {
  if (kBits == 8) {
    // 3 2 1 0 -> . 1 . 0 and . 3 . 2
    const __m512i low = _mm512_set4_epi32(-0x7ff27ff4, -0x7ff67ff8, -0x7ffa7ffc, -0x7ffe8000);
    const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi32(0x00020002));
    pair[0] = _mm512_shuffle_epi8(words[0], low);
    pair[1] = _mm512_shuffle_epi8(words[0], high);
  } else if (kBits == 3) {
    const __m512i mask = _mm512_set1_epi32(0x00070007);
#pragma GCC unroll 3
    for (int w = 0; w < 3; ++w) {
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) pair[5 * w + i] = _mm512_and_si512(_mm512_srli_epi32(words[w], 3 * i), mask);
    }
    // Bit b of the last pair is bits 15 and 31 of word b.
    const __m512i bit = _mm512_set1_epi32(0x00010001);
    const __m512i b0 = _mm512_and_si512(_mm512_srli_epi32(words[0], 15), bit);
    const __m512i b1 = _mm512_and_si512(_mm512_srli_epi32(words[1], 14), _mm512_slli_epi32(bit, 1));
    const __m512i b2 = _mm512_and_si512(_mm512_srli_epi32(words[2], 13), _mm512_slli_epi32(bit, 2));
    pair[15] = _mm512_or_si512(_mm512_or_si512(b0, b1), b2);
  } else {
    const __m512i mask = _mm512_set1_epi32(kBits == 4 ? 0x000f000f : 0x00030003);
#pragma GCC unroll 8
    for (int i = 0; i < 16 / kBits; ++i) pair[i] = _mm512_and_si512(_mm512_srli_epi32(words[0], kBits * i), mask);
  }
}

// The same as quads of bytes, their rows in the order of quad_order.
template <int kBits>
EXLLAMA_AVX512_INLINE void split_quads(const __m512i* words, __m512i* quad) {
  if (kBits == 8) {
    quad[0] = words[0];
  } else if (kBits == 3) {
    __m512i pair[16];
    split_pairs<3>(words, pair);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) quad[i] = _mm512_or_si512(pair[2 * i], _mm512_slli_epi32(pair[2 * i + 1], 8));
  } else {
    const __m512i mask = _mm512_set1_epi32(kBits == 4 ? 0x0f0f0f0f : 0x03030303);
#pragma GCC unroll 4
    for (int i = 0; i < 8 / kBits; ++i) quad[i] = _mm512_and_si512(_mm512_srli_epi32(words[0], kBits * i), mask);
  }
}

// The zero points of 16 columns of a group; column is a multiple of 4 and the lanes off the mask are zero.
template <int bits>
EXLLAMA_AVX512_INLINE __m512i zeros_of_strip(const Weight& weight, int64_t group, int64_t column, __mmask16 mask) {
  if (!mask) return _mm512_setzero_si512();
  const int64_t row_words = weight.N * bits / 32, first = column * bits / 32;
  const int shift = static_cast<int>(column * bits % 32);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // 16 values reach over at most five words.
  const __mmask16 there = mask_of(row_words - first) & 0x1f;
  const __m512i words = _mm512_maskz_loadu_epi32(there, weight.qzeros + group * row_words + first);
  const __m512i position = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(bits)), _mm512_set1_epi32(shift));
  const __m512i word = _mm512_srli_epi32(position, 5), from = _mm512_and_si512(position, _mm512_set1_epi32(31));
  const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, words), from);
  // A shift by 32 gives zero.
  const __m512i next = _mm512_permutexvar_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(1)), words);
  const __m512i high = _mm512_sllv_epi32(next, _mm512_sub_epi32(_mm512_set1_epi32(32), from));
  const __m512i stored = _mm512_and_si512(_mm512_or_si512(low, high), _mm512_set1_epi32((1 << bits) - 1));
  return _mm512_maskz_add_epi32(mask, stored, _mm512_set1_epi32(weight.zeros_v2 ? 0 : 1));
}

EXLLAMA_AVX512_INLINE __m512 scales_of_strip(const Weight& weight, int64_t group, int64_t column, __mmask16 mask) {
  const int64_t index = group * weight.N + column;
  if (weight.scales_dtype == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weight.scales) + index);
  }
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weight.scales) + index);
  if (weight.scales_dtype == DType::kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

}  // namespace
}  // namespace exllama::cpu
