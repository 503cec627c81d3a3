// The vocabulary of generic/ for AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "cpu/cpu.h"

#define EXLLAMA_VECTOR __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define EXLLAMA_VECTOR_INLINE EXLLAMA_VECTOR inline __attribute__((always_inline))

namespace exllama::cpu {
namespace {

using Int = __m512i;
using Float = __m512;
using Mask = __mmask16;
using Short = __m256i;  // kStrip numbers of 16 bits
using Bytes = __m128i;

constexpr int kStrip = 16;
// 12 x 2 sums take 24 of 32 registers, which leaves the weights and one broadcast. Few rows take 4 strips, so that enough
// sums are in flight for the 5 cycles of a dot product.
constexpr int kTallRows = 12, kWideRows = 6;
constexpr int kFloatStrips = 2;
// 8 x 2 sums leave half of the registers to words, terms and a broadcast.
constexpr int kGemvVectors = 8;
// dot_int8 takes unsigned bytes with signed ones.
constexpr bool kSignedDots = false;

EXLLAMA_VECTOR_INLINE Int lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
// The first `count` lanes.
EXLLAMA_VECTOR_INLINE Mask mask_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return _mm512_set1_epi32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) { return _mm512_loadu_si512(from); }
EXLLAMA_VECTOR_INLINE Int load_int_masked(const void* from, Mask mask) { return _mm512_maskz_loadu_epi32(mask, from); }
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { _mm512_storeu_si512(to, value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
// One byte of each lane of a, and the others of b.
template <int byte>
EXLLAMA_VECTOR_INLINE Int byte_into(Int a, Int b) {
  return _mm512_mask_blend_epi8(0x1111111111111111u << byte, b, a);
}
EXLLAMA_VECTOR_INLINE Int sub_int8(Int a, Int b) { return _mm512_sub_epi8(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int16(Int a, Int b) { return _mm512_sub_epi16(a, b); }
EXLLAMA_VECTOR_INLINE Int sub_int32(Int a, Int b) { return _mm512_sub_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int add_int32(Int a, Int b) { return _mm512_add_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int multiply_int32(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, int bits) { return _mm512_slli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, Int bits) { return _mm512_sllv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, int bits) { return _mm512_srli_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, Int bits) { return _mm512_srlv_epi32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right_signed(Int a, int bits) { return _mm512_srai_epi32(a, bits); }
// Lanes below `lane` of a, the others of b.
EXLLAMA_VECTOR_INLINE Int join(Int a, Int b, int lane) { return _mm512_mask_mov_epi32(b, mask_of(lane), a); }
// Zero off the mask.
EXLLAMA_VECTOR_INLINE Int keep(Mask mask, Int a) { return _mm512_maskz_mov_epi32(mask, a); }
EXLLAMA_VECTOR_INLINE Int abs_int32(Int a) { return _mm512_abs_epi32(a); }
EXLLAMA_VECTOR_INLINE Int max_int32(Int a, Int b) { return _mm512_max_epi32(a, b); }
EXLLAMA_VECTOR_INLINE int32_t reduce_max(Int a) { return _mm512_reduce_max_epi32(a); }
EXLLAMA_VECTOR_INLINE int32_t reduce_add(Int a) { return _mm512_reduce_add_epi32(a); }
EXLLAMA_VECTOR_INLINE bool any_bit(Int a) { return _mm512_test_epi32_mask(a, a) != 0; }
EXLLAMA_VECTOR_INLINE Int permute(Int a, Int lane) { return _mm512_permutexvar_epi32(lane, a); }

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return _mm512_set1_ps(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return _mm512_loadu_ps(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { _mm512_storeu_ps(to, value); }
EXLLAMA_VECTOR_INLINE Float load_floats_masked(const float* from, Mask mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}
EXLLAMA_VECTOR_INLINE void store_floats_masked(float* to, Mask mask, Float value) {
  _mm512_mask_storeu_ps(to, mask, value);
}
// The first `count` entries, which may be more than there are.
EXLLAMA_VECTOR_INLINE void store_floats_upto(float* to, Float value, int64_t count) {
  _mm512_mask_storeu_ps(to, mask_of(count), value);
}
// from[index[i]], zero beyond `count` entries and where the index is negative.
EXLLAMA_VECTOR_INLINE Float gather_floats(const float* from, const int32_t* index, int64_t count) {
  const Mask there = mask_of(count);
  const __m512i indices = _mm512_maskz_loadu_epi32(there, index);
  const Mask mask = _mm512_mask_cmpge_epi32_mask(there, indices, _mm512_setzero_si512());
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, indices, from, 4);
}
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
EXLLAMA_VECTOR_INLINE Int to_nearest_int(Float value) { return _mm512_cvtps_epi32(value); }
EXLLAMA_VECTOR_INLINE Int as_int(Float value) { return _mm512_castps_si512(value); }
EXLLAMA_VECTOR_INLINE Float as_float(Int value) { return _mm512_castsi512_ps(value); }
EXLLAMA_VECTOR_INLINE Int where_nan(Float value, Int nan, Int number) {
  return _mm512_mask_mov_epi32(number, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), nan);
}
EXLLAMA_VECTOR_INLINE Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
// sum = fma(a, b, sum). This is assembler because gcc 12 moves sums between registers until some go to memory.
EXLLAMA_VECTOR_INLINE void fma_into(Float& sum, Float a, Float b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

EXLLAMA_VECTOR_INLINE Short load_shorts(const uint16_t* from, int64_t count) {
  return _mm256_maskz_loadu_epi16(mask_of(count), from);
}
EXLLAMA_VECTOR_INLINE void store_shorts(void* to, Short values, int64_t count) {
  _mm256_mask_storeu_epi16(to, mask_of(count), values);
}
// Values that fit 16 bits.
EXLLAMA_VECTOR_INLINE Short narrow_signed(Int values) { return _mm512_cvtepi32_epi16(values); }
EXLLAMA_VECTOR_INLINE Short narrow_unsigned(Int values) { return _mm512_cvtepi32_epi16(values); }
EXLLAMA_VECTOR_INLINE Short to_half(Float values) { return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
EXLLAMA_VECTOR_INLINE Float widen(Short values, DType dtype) {
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(values);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// `count` entries from `index` on, zero beyond them.
EXLLAMA_VECTOR_INLINE Float load_any(const void* from, DType dtype, int64_t index, int64_t count) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask_of(count), static_cast<const float*>(from) + index);
  return widen(load_shorts(static_cast<const uint16_t*>(from) + index, count), dtype);
}

// NEON leaves the two products in two lanes, which `whole` adds in the end.
using PairSum = Int;
EXLLAMA_VECTOR_INLINE PairSum pair_sum(Int start) { return start; }
EXLLAMA_VECTOR_INLINE Int whole(PairSum sum) { return sum; }

// sum += two int16 products. This is assembler because gcc 12 copies the sums of the intrinsic to and fro, and computes
// all products first where there are two instructions.
template <bool vnni>
EXLLAMA_VECTOR_INLINE void dot_int16(Int& sum, Int a, Int b) {
  if constexpr (vnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    Int product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(a), "v"(b));
  }
}

// sum += four products of unsigned a with signed b, with VNNI.
EXLLAMA_VECTOR_INLINE void dot_int8(Int& sum, Int a, Int b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// sum += two products of unsigned a with signed b in each lane of 16 bits, where neither may overflow.
EXLLAMA_VECTOR_INLINE void dot_int8_short(Int& sum, Int a, Int b) {
  Int product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(a), "v"(b));
}
// The two lanes of 16 bits in each of 32.
EXLLAMA_VECTOR_INLINE Int int16_pairs(Int a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
// The sum stays in memory. This is assembler because gcc 12 would keep it in registers, and spill those of inner loops.
EXLLAMA_VECTOR_INLINE void add_int16_pairs(Int& sum, Int a) {
  Int pairs = int16_pairs(a);
  asm("vpaddd %0, %1, %1\n\tvmovdqa64 %1, %0" : "+m"(sum), "+v"(pairs));
}

// Rows 0 and 1 of 8-bit words, or rows 2 and 3, in 16 bits each: bytes 3 2 1 0 become . 1 . 0 or . 3 . 2.
EXLLAMA_VECTOR_INLINE Int byte_pair(Int words, int pair) {
  const Int low = _mm512_set4_epi32(-0x7ff27ff4, -0x7ff67ff8, -0x7ffa7ffc, -0x7ffe8000);
  return _mm512_shuffle_epi8(words, pair == 0 ? low : _mm512_add_epi8(low, set_int(0x00020002)));
}

EXLLAMA_VECTOR_INLINE Bytes load_bytes(const uint8_t* from) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(from));
}
// (from[order[i]] >> shift) + offset as a byte, for 16 entries, or as many as there are.
EXLLAMA_VECTOR_INLINE void pack_16_bytes(const int16_t* from, int64_t count, int shift, int offset, Bytes order,
                                         uint8_t* to) {
  const __mmask16 mask = mask_of(count);
  const __m256i shifted = _mm256_sra_epi16(_mm256_maskz_loadu_epi16(mask, from), _mm_cvtsi32_si128(shift));
  const __m256i moved = _mm256_add_epi16(shifted, _mm256_set1_epi16(static_cast<int16_t>(offset)));
  _mm_mask_storeu_epi8(to, mask, _mm_shuffle_epi8(_mm256_cvtepi16_epi8(moved), order));
}

}  // namespace
}  // namespace exllama::cpu
