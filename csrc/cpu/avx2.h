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

namespace avx2 {
void gemv(const Gemv& gemv);
void gemv_vnni(const Gemv& gemv);
}  // namespace avx2

namespace {

using Int = __m256i;
using Float = __m256;
constexpr int kStrip = 8;
// Of 16 registers, 6 x 2 sums leave two weights, a broadcast and a product.
constexpr int kTallRows = 6, kWideRows = 0;
// 4 x 2 sums leave two words, two terms, a mask, a broadcast and a product.
constexpr int kGemvVectors = 4;

using Mask = __m256i;

EXLLAMA_VECTOR_INLINE Int lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
// The first `count` lanes.
EXLLAMA_VECTOR_INLINE Mask mask_of(int64_t count) {
  const int lanes_there = static_cast<int>(count < 0 ? 0 : count > kStrip ? kStrip : count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes_there), lanes());
}

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return _mm256_set1_epi32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
EXLLAMA_VECTOR_INLINE Int load_int_masked(const void* from, Mask mask) {
  return _mm256_maskload_epi32(static_cast<const int*>(from), mask);
}
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int8(Int a, Int b) { return _mm256_sub_epi8(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int16(Int a, Int b) { return _mm256_sub_epi16(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int32(Int a, Int b) { return _mm256_sub_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int add_int32(Int a, Int b) { return _mm256_add_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int multiply_int32(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, int bits) { return _mm256_slli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, Int bits) { return _mm256_sllv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, int bits) { return _mm256_srli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, Int bits) { return _mm256_srlv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right_signed(Int a, int bits) { return _mm256_srai_epi32(a, bits); }
// Lanes below `lane` of a, the others of b.
EXLLAMA_VECTOR_INLINE Int join(Int a, Int b, int lane) { return _mm256_blendv_epi8(b, a, mask_of(lane)); }
// Zero off the mask.
EXLLAMA_VECTOR_INLINE Int keep(Mask mask, Int a) { return _mm256_and_si256(mask, a); }
EXLLAMA_VECTOR_INLINE Int permute(Int a, Int lane) { return _mm256_permutevar8x32_epi32(a, lane); }

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return _mm256_set1_ps(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return _mm256_loadu_ps(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { _mm256_storeu_ps(to, value); }
EXLLAMA_VECTOR_INLINE Float load_floats_masked(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }
EXLLAMA_VECTOR_INLINE void store_floats_masked(float* to, Mask mask, Float value) {
  _mm256_maskstore_ps(to, mask, value);
}
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

EXLLAMA_VECTOR_INLINE Float widen(__m128i values, DType dtype) {
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(values);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

// `count` entries from `index` on, zero beyond them.
EXLLAMA_VECTOR_INLINE Float load_any(const void* from, DType dtype, int64_t index, int64_t count) {
  if (dtype == DType::kFloat32) return _mm256_maskload_ps(static_cast<const float*>(from) + index, mask_of(count));
  const uint16_t* source = static_cast<const uint16_t*>(from) + index;
  if (count >= kStrip) return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)), dtype);
  alignas(16) uint16_t values[kStrip] = {};
  for (int i = 0; i < count; ++i) values[i] = source[i];
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(values)), dtype);
}

// sum += two int16 products. As assembler, since gcc 12 sees to all products first and has no registers for them.
template <bool kVnni>
EXLLAMA_VECTOR_INLINE void dot_int16(Int& sum, Int a, Int b) {
  if (kVnni) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  } else {
    Int product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  }
}

// sum += four products of unsigned a with signed b, with AVX-VNNI.
EXLLAMA_VECTOR_INLINE void dot_int8(Int& sum, Int a, Int b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

// Of 8-bit words: rows 0 and 1, or rows 2 and 3, in 16 bits each.
EXLLAMA_VECTOR_INLINE Int byte_pair(Int words, int pair) {
  // Bytes 3 2 1 0 become 3 1 2 0, of which the even ones are one pair and the odd ones the other.
  const Int order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10,
                                     9, 11, 12, 14, 13, 15);
  return _mm256_and_si256(_mm256_srli_epi32(_mm256_shuffle_epi8(words, order), 8 * pair), set_int(0x00ff00ff));
}

}  // namespace
}  // namespace exllama::cpu

#include "vectors.h"
