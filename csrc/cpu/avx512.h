// The vocabulary of vectors.h for AVX-512 (F, BW, DQ, VL), and what its sources share beyond that.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "kernels_scalar.h"

#define EXLLAMA_VECTOR __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define EXLLAMA_VECTOR_INLINE EXLLAMA_VECTOR inline __attribute__((always_inline))

namespace exllama::cpu {

namespace avx512 {
void gemv(const Gemv& gemv);
void gemv_vnni(const Gemv& gemv);
}  // namespace avx512

namespace {

using Int = __m512i;
using Float = __m512;
constexpr int kStrip = 16;
// Of 32 registers 12 x 2 sums take 24, which leaves the weights and one broadcast; fewer rows take 4 strips, so that
// enough sums are in flight for the 5 cycles of a dot product.
constexpr int kTallRows = 12, kWideRows = 6;

// The first `count` lanes.
EXLLAMA_VECTOR_INLINE __mmask16 mask_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return _mm512_set1_epi32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) { return _mm512_loadu_si512(from); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from, int64_t count) {
  return _mm512_maskz_loadu_epi32(mask_of(count), from);
}
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { _mm512_storeu_si512(to, value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int8(Int a, Int b) { return _mm512_sub_epi8(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int16(Int a, Int b) { return _mm512_sub_epi16(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int32(Int a, Int b) { return _mm512_sub_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int multiply_int32(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, int bits) { return _mm512_slli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, int bits) { return _mm512_srli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, Int bits) { return _mm512_srlv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right_signed(Int a, int bits) { return _mm512_srai_epi32(a, bits); }
// Lanes below `lane` of a, the others of b.
EXLLAMA_VECTOR_INLINE Int join(Int a, Int b, int lane) { return _mm512_mask_mov_epi32(b, mask_of(lane), a); }

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return _mm512_set1_ps(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return _mm512_loadu_ps(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { _mm512_storeu_ps(to, value); }
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

// sum += two int16 products. As assembler, since gcc 12 copies the sums of the intrinsic to and fro.
template <bool kVnni>
EXLLAMA_VECTOR_INLINE void dot_int16(Int& sum, Int a, Int b) {
  if (kVnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
}

// sum += four products of unsigned a with signed b.
EXLLAMA_VECTOR_INLINE void dot_int8(Int& sum, Int a, Int b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// 8-bit words as pairs: bytes 3 2 1 0 -> . 1 . 0 and . 3 . 2.
EXLLAMA_VECTOR_INLINE void split_bytes(Int words, Int* pair) {
  const __m512i low = _mm512_set4_epi32(-0x7ff27ff4, -0x7ff67ff8, -0x7ffa7ffc, -0x7ffe8000);
  const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi32(0x00020002));
  pair[0] = _mm512_shuffle_epi8(words, low);
  pair[1] = _mm512_shuffle_epi8(words, high);
}

}  // namespace
}  // namespace exllama::cpu

#include "vectors.h"

namespace exllama::cpu {
namespace {

// A block of words of a shuffled weight as quads of bytes, their rows in the order of quad_order.
template <int kBits>
EXLLAMA_VECTOR_INLINE void split_quads(const __m512i* words, __m512i* quad) {
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
EXLLAMA_VECTOR_INLINE __m512i zeros_of_strip(const Weight& weight, int64_t group, int64_t column, __mmask16 mask) {
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

EXLLAMA_VECTOR_INLINE __m512 scales_of_strip(const Weight& weight, int64_t group, int64_t column, __mmask16 mask) {
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
