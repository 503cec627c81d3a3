// The vocabulary of generic/ for NEON. What includes it says with which extensions: EXLLAMA_VECTOR and
// EXLLAMA_HAS_DOTPROD.
#pragma once

#include <arm_neon.h>

#include "cpu/cpu.h"

#define EXLLAMA_VECTOR_INLINE EXLLAMA_VECTOR inline __attribute__((always_inline))

namespace exllama::cpu {
namespace {

using Int = int32x4_t;
using Float = float32x4_t;
using Mask = int;  // how many lanes from the first on: NEON loads and stores all lanes or one
using Short = uint16x4_t;
using Bytes = uint8x16_t;

// Two int16 products go to two lanes, which `whole` adds: those of columns 0 and 1 lie in `low`.
struct PairSum {
  Int low, high;
};

constexpr int kStrip = 4;
// 5 x 2 sums of pairs take 20 of 32 registers, which leaves the weights and broadcasts.
constexpr int kTallRows = 5, kWideRows = 0;
// Sums of floats take one register each.
constexpr int kFloatStrips = 4;
constexpr int kGemvVectors = 4;
// dot_int8 takes signed bytes for both.
constexpr bool kSignedDots = true;

EXLLAMA_VECTOR_INLINE Int lanes() {
  const int32_t numbers[] = {0, 1, 2, 3};
  return vld1q_s32(numbers);
}
// The first `count` lanes.
EXLLAMA_VECTOR_INLINE Mask mask_of(int64_t count) {
  return static_cast<int>(count < 0 ? 0 : count > kStrip ? kStrip : count);
}

EXLLAMA_VECTOR_INLINE uint8x16_t as_bytes(Int a) { return vreinterpretq_u8_s32(a); }
EXLLAMA_VECTOR_INLINE uint32x4_t as_unsigned(Int a) { return vreinterpretq_u32_s32(a); }
EXLLAMA_VECTOR_INLINE int16x8_t as_shorts(Int a) { return vreinterpretq_s16_s32(a); }
EXLLAMA_VECTOR_INLINE Int from_bytes(uint8x16_t a) { return vreinterpretq_s32_u8(a); }
EXLLAMA_VECTOR_INLINE Int from_unsigned(uint32x4_t a) { return vreinterpretq_s32_u32(a); }

EXLLAMA_VECTOR_INLINE Int set_int(int32_t value) { return vdupq_n_s32(value); }
EXLLAMA_VECTOR_INLINE Int load_int(const void* from) { return vld1q_s32(static_cast<const int32_t*>(from)); }
EXLLAMA_VECTOR_INLINE Int load_int_masked(const void* from, Mask mask) {
  const int32_t* source = static_cast<const int32_t*>(from);
  if (mask == kStrip) return vld1q_s32(source);
  int32_t values[kStrip] = {};
  for (int i = 0; i < mask; ++i) values[i] = source[i];
  return vld1q_s32(values);
}
EXLLAMA_VECTOR_INLINE void store_int(void* to, Int value) { vst1q_s32(static_cast<int32_t*>(to), value); }
EXLLAMA_VECTOR_INLINE Int bit_and(Int a, Int b) { return vandq_s32(a, b); }
EXLLAMA_VECTOR_INLINE Int bit_or(Int a, Int b) { return vorrq_s32(a, b); }
// One byte of each lane of a, and the others of b, where that byte is zero.
template <int byte>
EXLLAMA_VECTOR_INLINE Int byte_into(Int a, Int b) {
  return vbslq_s32(vdupq_n_u32(0xffu << 8 * byte), a, b);
}
EXLLAMA_VECTOR_INLINE Int sub_int8(Int a, Int b) { return from_bytes(vsubq_u8(as_bytes(a), as_bytes(b))); }
EXLLAMA_VECTOR_INLINE Int sub_int16(Int a, Int b) {
  return vreinterpretq_s32_s16(vsubq_s16(as_shorts(a), as_shorts(b)));
}
EXLLAMA_VECTOR_INLINE Int sub_int32(Int a, Int b) { return vsubq_s32(a, b); }
EXLLAMA_VECTOR_INLINE Int add_int32(Int a, Int b) { return vaddq_s32(a, b); }
EXLLAMA_VECTOR_INLINE Int multiply_int32(Int a, Int b) { return vmulq_s32(a, b); }
// A shift by 32 gives zero.
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, Int bits) { return vshlq_s32(a, bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, Int bits) {
  return from_unsigned(vshlq_u32(as_unsigned(a), vnegq_s32(bits)));
}
// Shifts by a number that is known when the loop is unrolled become immediate ones.
EXLLAMA_VECTOR_INLINE Int shift_left(Int a, int bits) { return from_unsigned(as_unsigned(a) << bits); }
EXLLAMA_VECTOR_INLINE Int shift_right(Int a, int bits) { return from_unsigned(as_unsigned(a) >> bits); }
EXLLAMA_VECTOR_INLINE Int shift_right_signed(Int a, int bits) { return a >> bits; }
// Lanes below `lane` of a, the others of b.
EXLLAMA_VECTOR_INLINE Int join(Int a, Int b, int lane) { return vbslq_s32(vcltq_s32(lanes(), set_int(lane)), a, b); }
// Zero off the mask.
EXLLAMA_VECTOR_INLINE Int keep(Mask mask, Int a) { return join(a, set_int(0), mask); }
EXLLAMA_VECTOR_INLINE Int abs_int32(Int a) { return vabsq_s32(a); }
EXLLAMA_VECTOR_INLINE Int max_int32(Int a, Int b) { return vmaxq_s32(a, b); }
EXLLAMA_VECTOR_INLINE int32_t reduce_max(Int a) { return vmaxvq_s32(a); }
EXLLAMA_VECTOR_INLINE int32_t reduce_add(Int a) { return vaddvq_s32(a); }
EXLLAMA_VECTOR_INLINE bool any_bit(Int a) { return vmaxvq_u32(as_unsigned(a)) != 0; }
// Lane lane[i] of a.
EXLLAMA_VECTOR_INLINE Int permute(Int a, Int lane) {
  const Int bytes = vmlaq_s32(set_int(0x03020100), lane, set_int(0x04040404));
  return from_bytes(vqtbl1q_u8(as_bytes(a), as_bytes(bytes)));
}

EXLLAMA_VECTOR_INLINE Float set_float(float value) { return vdupq_n_f32(value); }
EXLLAMA_VECTOR_INLINE Float load_floats(const float* from) { return vld1q_f32(from); }
EXLLAMA_VECTOR_INLINE void store_floats(float* to, Float value) { vst1q_f32(to, value); }
EXLLAMA_VECTOR_INLINE Float load_floats_masked(const float* from, Mask mask) {
  return vreinterpretq_f32_s32(load_int_masked(from, mask));
}
EXLLAMA_VECTOR_INLINE void store_floats_masked(float* to, Mask mask, Float value) {
  if (mask == kStrip) return vst1q_f32(to, value);
  float values[kStrip];
  vst1q_f32(values, value);
  for (int i = 0; i < mask; ++i) to[i] = values[i];
}
// The first `count` entries, which may be more than there are.
EXLLAMA_VECTOR_INLINE void store_floats_upto(float* to, Float value, int64_t count) {
  store_floats_masked(to, mask_of(count), value);
}
// from[index[i]], zero beyond `count` entries and where the index is negative.
EXLLAMA_VECTOR_INLINE Float gather_floats(const float* from, const int32_t* index, int64_t count) {
  float values[kStrip] = {};
  for (int i = 0; i < mask_of(count); ++i) values[i] = index[i] < 0 ? 0.0f : from[index[i]];
  return vld1q_f32(values);
}
EXLLAMA_VECTOR_INLINE Float to_float(Int value) { return vcvtq_f32_s32(value); }
EXLLAMA_VECTOR_INLINE Int to_nearest_int(Float value) { return vcvtnq_s32_f32(value); }
EXLLAMA_VECTOR_INLINE Int as_int(Float value) { return vreinterpretq_s32_f32(value); }
EXLLAMA_VECTOR_INLINE Float as_float(Int value) { return vreinterpretq_f32_s32(value); }
EXLLAMA_VECTOR_INLINE Int where_nan(Float value, Int nan, Int number) {
  return vbslq_s32(vceqq_f32(value, value), number, nan);
}
EXLLAMA_VECTOR_INLINE Float subtract(Float a, Float b) { return vsubq_f32(a, b); }
EXLLAMA_VECTOR_INLINE Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
EXLLAMA_VECTOR_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
// sum = fma(a, b, sum).
EXLLAMA_VECTOR_INLINE void fma_into(Float& sum, Float a, Float b) { sum = vfmaq_f32(sum, a, b); }

EXLLAMA_VECTOR_INLINE Short load_shorts(const uint16_t* from, int64_t count) {
  if (count >= kStrip) return vld1_u16(from);
  uint16_t values[kStrip] = {};
  for (int i = 0; i < count; ++i) values[i] = from[i];
  return vld1_u16(values);
}
EXLLAMA_VECTOR_INLINE void store_shorts(void* to, Short values, int64_t count) {
  uint16_t* out = static_cast<uint16_t*>(to);
  if (count >= kStrip) return vst1_u16(out, values);
  uint16_t there[kStrip];
  vst1_u16(there, values);
  for (int i = 0; i < count; ++i) out[i] = there[i];
}
// Values that fit 16 bits.
EXLLAMA_VECTOR_INLINE Short narrow_signed(Int values) { return vmovn_u32(as_unsigned(values)); }
EXLLAMA_VECTOR_INLINE Short narrow_unsigned(Int values) { return vmovn_u32(as_unsigned(values)); }
EXLLAMA_VECTOR_INLINE Short to_half(Float values) { return vreinterpret_u16_f16(vcvt_f16_f32(values)); }
EXLLAMA_VECTOR_INLINE Float widen(Short values, DType dtype) {
  if (dtype == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(values));
  return vreinterpretq_f32_u32(vshll_n_u16(values, 16));
}

// `count` entries from `index` on, zero beyond them.
EXLLAMA_VECTOR_INLINE Float load_any(const void* from, DType dtype, int64_t index, int64_t count) {
  if (dtype != DType::kFloat32) return widen(load_shorts(static_cast<const uint16_t*>(from) + index, count), dtype);
  return load_floats_masked(static_cast<const float*>(from) + index, mask_of(count));
}

EXLLAMA_VECTOR_INLINE PairSum pair_sum(Int start) {
  return {vzip1q_s32(start, set_int(0)), vzip2q_s32(start, set_int(0))};
}
EXLLAMA_VECTOR_INLINE Int whole(Int sum) { return sum; }
EXLLAMA_VECTOR_INLINE Int whole(PairSum sum) { return vpaddq_s32(sum.low, sum.high); }
// sum += two int16 products.
template <bool vnni>
EXLLAMA_VECTOR_INLINE void dot_int16(PairSum& sum, Int a, Int b) {
  sum.low = vmlal_s16(sum.low, vget_low_s16(as_shorts(a)), vget_low_s16(as_shorts(b)));
  sum.high = vmlal_high_s16(sum.high, as_shorts(a), as_shorts(b));
}

// sum += four products of signed bytes. Without dotprod, two of them must fit int16: a >= -127.
EXLLAMA_VECTOR_INLINE void dot_int8(Int& sum, Int a, Int b) {
#if EXLLAMA_HAS_DOTPROD
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
#else
  const int8x16_t left = vreinterpretq_s8_s32(a), right = vreinterpretq_s8_s32(b);
  const int16x8_t low = vmull_s8(vget_low_s8(left), vget_low_s8(right)), high = vmull_high_s8(left, right);
  sum = vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}

// Rows 0 and 1 of 8-bit words, or rows 2 and 3, in 16 bits each: bytes 3 2 1 0 become . 1 . 0 or . 3 . 2.
EXLLAMA_VECTOR_INLINE Int byte_pair(Int words, int pair) {
  const uint32_t order[] = {0xff01ff00, 0xff05ff04, 0xff09ff08, 0xff0dff0c};
  const uint32x4_t low = vld1q_u32(order);
  const uint32x4_t bytes = pair == 0 ? low : vaddq_u32(low, vdupq_n_u32(0x00020002));
  return from_bytes(vqtbl1q_u8(as_bytes(words), vreinterpretq_u8_u32(bytes)));
}

EXLLAMA_VECTOR_INLINE Bytes load_bytes(const uint8_t* from) { return vld1q_u8(from); }
// (from[order[i]] >> shift) + offset as a byte, for 16 entries, or as many as there are.
EXLLAMA_VECTOR_INLINE void pack_16_bytes(const int16_t* from, int64_t count, int shift, int offset, Bytes order,
                                         uint8_t* to) {
  int16_t padded[16] = {};
  if (count < 16) {
    for (int i = 0; i < count; ++i) padded[i] = from[i];
    from = padded;
  }
  const int16x8_t by = vdupq_n_s16(static_cast<int16_t>(-shift)), plus = vdupq_n_s16(static_cast<int16_t>(offset));
  const int16x8_t first = vaddq_s16(vshlq_s16(vld1q_s16(from), by), plus);
  const int16x8_t second = vaddq_s16(vshlq_s16(vld1q_s16(from + 8), by), plus);
  const int8x16_t packed = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
  const uint8x16_t ordered = vqtbl1q_u8(vreinterpretq_u8_s8(packed), order);
  if (count >= 16) return vst1q_u8(to, ordered);
  uint8_t there[16];
  vst1q_u8(there, ordered);
  for (int i = 0; i < count; ++i) to[i] = there[i];
}

}  // namespace
}  // namespace exllama::cpu
