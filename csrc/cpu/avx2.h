// The vocabulary of vectors.h for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "kernels_scalar.h"

#define EXLLAMA_VECTOR __attribute__((target("avx2,fma,f16c")))
#define EXLLAMA_VECTOR_INLINE EXLLAMA_VECTOR inline __attribute__((always_inline))

namespace exllama::cpu {
namespace {

using Int = __m256i;
using Float = __m256;
constexpr int kStrip = 8;
// Of 16 registers, 6 x 2 sums leave two weights, a broadcast and a product.
constexpr int kTallRows = 6, kWideRows = 0;

// The first `count` lanes.
EXLLAMA_VECTOR_INLINE Int mask_of(int64_t count) {
  const int lanes = static_cast<int>(count < 0 ? 0 : count > kStrip ? kStrip : count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return _mm256_set1_epi32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
EXLLAMA_VECTOR_INLINE Int load_int(const void* from, int64_t count) {
  return _mm256_maskload_epi32(static_cast<const int*>(from), mask_of(count));
}
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int16(Int a, Int b) { return _mm256_sub_epi16(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int32(Int a, Int b) { return _mm256_sub_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, int bits) { return _mm256_slli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, int bits) { return _mm256_srli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, Int bits) { return _mm256_srlv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right_signed(Int a, int bits) { return _mm256_srai_epi32(a, bits); }
// Lanes below `lane` of a, the others of b.
EXLLAMA_VECTOR_INLINE Int join(Int a, Int b, int lane) { return _mm256_blendv_epi8(b, a, mask_of(lane)); }

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return _mm256_set1_ps(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return _mm256_loadu_ps(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { _mm256_storeu_ps(to, value); }
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

// sum += two int16 products.
template <bool kVnni>
EXLLAMA_VECTOR_INLINE void dot_int16(Int& sum, Int a, Int b) {
  if (kVnni) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  } else {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
}

// 8-bit words as pairs: bytes 3 2 1 0 -> 3 1 2 0, whose even bytes are rows 0 and 1, the odd ones 2 and 3.
EXLLAMA_VECTOR_INLINE void split_bytes(Int words, Int* pair) {
  const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7,
                                         8, 10, 9, 11, 12, 14, 13, 15);
  const __m256i ordered = _mm256_shuffle_epi8(words, order), mask = _mm256_set1_epi32(0x00ff00ff);
  pair[0] = _mm256_and_si256(ordered, mask);
  pair[1] = _mm256_and_si256(_mm256_srli_epi32(ordered, 8), mask);
}

}  // namespace
}  // namespace exllama::cpu

#include "vectors.h"
