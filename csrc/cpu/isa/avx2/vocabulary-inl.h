// The vocabulary of generic/ for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/cpu.h"

#define EXLLAMA_VECTOR __attribute__((target("avx2,fma,f16c")))
#define EXLLAMA_VECTOR_INLINE EXLLAMA_VECTOR inline __attribute__((always_inline))

namespace exllama::cpu {
namespace {

using Int = __m256i;
using Float = __m256;
using Mask = __m256i;
using Short = __m128i;  // kStrip numbers of 16 bits
using Bytes = __m128i;

constexpr int kStrip = 8;
// 6 x 2 sums leave 4 of 16 registers: two weights, a broadcast and a product.
constexpr int kTallRows = 6, kWideRows = 0;
constexpr int kFloatStrips = 2;
// 4 x 2 sums leave two words, two terms, a mask, a broadcast and a product.
constexpr int kGemvVectors = 4;
// dot_int8 takes unsigned bytes with signed ones.
constexpr bool kSignedDots = false;

EXLLAMA_VECTOR_INLINE Int lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
// The first `count` lanes.
EXLLAMA_VECTOR_INLINE Mask mask_of(int64_t count) {
  const int lanes_there = static_cast<int>(count < 0 ? 0 : count > kStrip ? kStrip : count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes_there), lanes());
}

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return _mm256_set1_epi32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
EXLLAMA_VECTOR_INLINE Int load_int_masked(const void* from, Mask mask) {
  return _mm256_maskload_epi32(static_cast<const int*>(from), mask);
}
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
// One byte of each lane of a, and the others of b, where that byte is zero.
template <int byte>
EXLLAMA_VECTOR_INLINE Int byte_into(Int a, Int b) {
  return bit_or(bit_and(a, set_int(0xff << 8 * byte)), b);
}
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
EXLLAMA_VECTOR_INLINE Int abs_int32(Int a) { return _mm256_abs_epi32(a); }
EXLLAMA_VECTOR_INLINE Int max_int32(Int a, Int b) { return _mm256_max_epi32(a, b); }
EXLLAMA_VECTOR_INLINE int32_t reduce_max(Int a) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
EXLLAMA_VECTOR_INLINE int32_t reduce_add(Int a) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
EXLLAMA_VECTOR_INLINE bool any_bit(Int a) { return !_mm256_testz_si256(a, a); }
EXLLAMA_VECTOR_INLINE Int permute(Int a, Int lane) { return _mm256_permutevar8x32_epi32(a, lane); }

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return _mm256_set1_ps(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return _mm256_loadu_ps(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { _mm256_storeu_ps(to, value); }
EXLLAMA_VECTOR_INLINE Float load_floats_masked(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }
EXLLAMA_VECTOR_INLINE void store_floats_masked(float* to, Mask mask, Float value) {
  _mm256_maskstore_ps(to, mask, value);
}
// The first `count` entries, which may be more than there are. A masked store of all is many times as slow on Zen.
EXLLAMA_VECTOR_INLINE void store_floats_upto(float* to, Float value, int64_t count) {
  if (count >= kStrip) return _mm256_storeu_ps(to, value);
  _mm256_maskstore_ps(to, mask_of(count), value);
}
// from[index[i]], zero beyond `count` entries and where the index is negative.
EXLLAMA_VECTOR_INLINE Float gather_floats(const float* from, const int32_t* index, int64_t count) {
  alignas(32) float values[kStrip] = {};
  for (int i = 0; i < kStrip && i < count; ++i) values[i] = index[i] < 0 ? 0.0f : from[index[i]];
  return _mm256_load_ps(values);
}
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
EXLLAMA_VECTOR_INLINE Int to_nearest_int(Float value) { return _mm256_cvtps_epi32(value); }
EXLLAMA_VECTOR_INLINE Int as_int(Float value) { return _mm256_castps_si256(value); }
EXLLAMA_VECTOR_INLINE Float as_float(Int value) { return _mm256_castsi256_ps(value); }
EXLLAMA_VECTOR_INLINE Int where_nan(Float value, Int nan, Int number) {
  return _mm256_blendv_epi8(number, nan, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
}
EXLLAMA_VECTOR_INLINE Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
// sum = fma(a, b, sum). This is assembler because gcc 12 moves sums between registers until some go to memory.
EXLLAMA_VECTOR_INLINE void fma_into(Float& sum, Float a, Float b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

EXLLAMA_VECTOR_INLINE Short load_shorts(const uint16_t* from, int64_t count) {
  if (count >= kStrip) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  alignas(16) uint16_t values[kStrip] = {};
  for (int i = 0; i < count; ++i) values[i] = from[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(values));
}
EXLLAMA_VECTOR_INLINE void store_shorts(void* to, Short values, int64_t count) {
  if (count >= kStrip) return _mm_storeu_si128(static_cast<__m128i*>(to), values);
  alignas(16) uint16_t there[kStrip];
  _mm_store_si128(reinterpret_cast<__m128i*>(there), values);
  for (int i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = there[i];
}
// Values that fit 16 bits.
EXLLAMA_VECTOR_INLINE Short narrow_signed(Int values) {
  return _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
}
EXLLAMA_VECTOR_INLINE Short narrow_unsigned(Int values) {
  return _mm_packus_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
}
EXLLAMA_VECTOR_INLINE Short to_half(Float values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
EXLLAMA_VECTOR_INLINE Float widen(Short values, DType dtype) {
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(values);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

// `count` entries from `index` on, zero beyond them.
EXLLAMA_VECTOR_INLINE Float load_any(const void* from, DType dtype, int64_t index, int64_t count) {
  if (dtype != DType::kFloat32) return widen(load_shorts(static_cast<const uint16_t*>(from) + index, count), dtype);
  const float* source = static_cast<const float*>(from) + index;
  return count >= kStrip ? _mm256_loadu_ps(source) : _mm256_maskload_ps(source, mask_of(count));
}

// NEON leaves the two products in two lanes, which `whole` adds in the end.
using PairSum = Int;
EXLLAMA_VECTOR_INLINE PairSum pair_sum(Int start) { return start; }
EXLLAMA_VECTOR_INLINE Int whole(PairSum sum) { return sum; }

// sum += two int16 products. This is assembler because gcc 12 computes all products first and has no registers for them.
template <bool vnni>
EXLLAMA_VECTOR_INLINE void dot_int16(Int& sum, Int a, Int b) {
  if constexpr (vnni) {
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

// sum += two products of unsigned a with signed b in each lane of 16 bits, where neither may overflow.
EXLLAMA_VECTOR_INLINE void dot_int8_short(Int& sum, Int a, Int b) {
  Int product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
}
// The two lanes of 16 bits in each of 32.
EXLLAMA_VECTOR_INLINE Int int16_pairs(Int a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
// The sum stays in memory. This is assembler because gcc 12 would keep it in registers, and spill those of inner loops.
EXLLAMA_VECTOR_INLINE void add_int16_pairs(Int& sum, Int a) {
  Int pairs = int16_pairs(a);
  asm("vpaddd %0, %1, %1\n\tvmovdqa %1, %0" : "+m"(sum), "+x"(pairs));
}

// Rows 0 and 1 of 8-bit words, or rows 2 and 3, in 16 bits each.
EXLLAMA_VECTOR_INLINE Int byte_pair(Int words, int pair) {
  // Bytes 3 2 1 0 become 3 1 2 0, of which the even ones are one pair and the odd ones the other.
  const Int order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8,
                                     10, 9, 11, 12, 14, 13, 15);
  return _mm256_and_si256(_mm256_srli_epi32(_mm256_shuffle_epi8(words, order), 8 * pair), set_int(0x00ff00ff));
}

EXLLAMA_VECTOR_INLINE Bytes load_bytes(const uint8_t* from) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(from));
}
// (from[order[i]] >> shift) + offset as a byte, for 16 entries, or as many as there are.
EXLLAMA_VECTOR_INLINE void pack_16_bytes(const int16_t* from, int64_t count, int shift, int offset, Bytes order,
                                         uint8_t* to) {
  alignas(32) int16_t padded[16] = {};
  if (count < 16) {
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    from = padded;
  }
  const __m256i shifted = _mm256_sra_epi16(load_int(from), _mm_cvtsi32_si128(shift));
  const __m256i moved = _mm256_add_epi16(shifted, _mm256_set1_epi16(static_cast<int16_t>(offset)));
  const __m256i low = _mm256_and_si256(moved, _mm256_set1_epi16(0xff));
  const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i ordered = _mm_shuffle_epi8(packed, order);
  if (count >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), ordered);
  alignas(16) uint8_t there[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(there), ordered);
  for (int i = 0; i < count; ++i) to[i] = there[i];
}

}  // namespace
}  // namespace exllama::cpu
