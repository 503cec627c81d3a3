// Rows of x and of the result: from any dtype to float, from float to integers, and back to any dtype.
#pragma once

#include "cpu/convert.h"
#include "cpu/isa/scalar/kernels.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

// `count` entries of x from `begin` on, or those that perm has there, zero beyond them and for -1.
EXLLAMA_VECTOR_INLINE Float load_strip(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count) {
  if (!perm) return load_any(x, dtype, begin, count);
  if (dtype == DType::kFloat32) return gather_floats(static_cast<const float*>(x), perm + begin, count);
  alignas(64) uint16_t gathered[kStrip] = {};
  const int there = count < kStrip ? count : kStrip;
  for (int j = 0; j < there; ++j) {
    const int32_t from = perm[begin + j];  // without a branch: -1 clears what x[0] has
    gathered[j] = static_cast<uint16_t>(static_cast<const uint16_t*>(x)[from < 0 ? 0 : from] & ~(from >> 31));
  }
  return widen(load_shorts(gathered, kStrip), dtype);
}

EXLLAMA_VECTOR inline void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
  for (int i = 0; i < count; i += kStrip) {
    store_floats_upto(out + i, load_strip(x, dtype, perm, begin + i, count - i), count - i);
  }
}

// The bits of bfloat16 in the low half of each lane, rounded to nearest even.
EXLLAMA_VECTOR_INLINE Int round_to_bfloat(Float value) {
  const Int bits = as_int(value);
  const Int odd = bit_and(shift_right(bits, 16), set_int(1));
  const Int rounded = shift_right(add_int32(bits, add_int32(odd, set_int(0x7fff))), 16);
  return where_nan(value, set_int(0x7fc0), rounded);
}

EXLLAMA_VECTOR inline bool store(const float* values, int count, void* out, DType dtype) {
  Int largest = set_int(0);
  for (int i = 0; i < count; i += kStrip) {
    const int left = count - i;
    const Float value = load_any(values, DType::kFloat32, i, left);
    largest = max_int32(largest, bit_and(as_int(value), set_int(kMagnitude)));
    if (dtype == DType::kFloat32) {
      store_floats_upto(static_cast<float*>(out) + i, value, left);
    } else {
      const Short rounded = dtype == DType::kFloat16 ? to_half(value) : narrow_unsigned(round_to_bfloat(value));
      store_shorts(static_cast<uint16_t*>(out) + i, rounded, left);
    }
  }
  return reduce_max(largest) < kInfinity;
}

EXLLAMA_VECTOR inline SpanScale quantize(const void* x, DType dtype, const int32_t* perm, const Span& span, int stride,
                                         int limit, int16_t* first, int16_t* second) {
  alignas(64) float values[kSpanRows];
  Int highest = set_int(0);
  for (int i = 0; i < span.rows; i += kStrip) {
    const Float value = load_strip(x, dtype, perm, span.row + i, span.rows - i);
    highest = max_int32(highest, bit_and(as_int(value), set_int(kMagnitude)));
    store_floats(values + i, value);
  }
  for (int i = static_cast<int>(round_up(span.rows, kStrip)); i < stride; i += kStrip) {
    store_floats(values + i, set_float(0));
  }
  const int32_t bits = reduce_max(highest);
  if (bits == 0 || bits >= kInfinity) return scalar::quantize_values(values, span.rows, stride, limit, first, second);

  const int exponent = scalar::scale_exponent(static_cast<uint32_t>(bits), limit);
  // 1 / scale in two factors, since 2^149 is no float.
  const Float up = set_float(power_of_two(exponent < -126 ? 126 : -exponent));
  const Float more = set_float(power_of_two(exponent < -126 ? -exponent - 126 : 0));
  Int largest = set_int(0), sum = largest, sum_abs = largest;
  for (int i = 0; i < stride; i += kStrip) {
    const Int q = to_nearest_int(multiply(multiply(load_floats(values + i), up), more));
    const Int q_abs = abs_int32(q);
    largest = max_int32(largest, q_abs);
    sum = add_int32(sum, q);
    sum_abs = add_int32(sum_abs, q_abs);
    store_shorts(first + i, narrow_signed(q), stride - i);
  }
  SpanScale scale{{power_of_two(exponent), 1}, {reduce_add(sum), 0}, Limbs::kOne};
  if (limit != 32767 || !scalar::has_outlier(span.rows, reduce_max(largest), reduce_add(sum_abs))) return scale;

  const int exponent2 = scalar::second_exponent(exponent);
  const Float finer = set_float(power_of_two(exponent - exponent2));
  Int any = set_int(0), second_sum = any;
  for (int i = 0; i < stride; i += kStrip) {
    const Float scaled = multiply(multiply(load_floats(values + i), up), more);
    const Float rest = subtract(scaled, to_float(to_nearest_int(scaled)));
    const Int q = to_nearest_int(multiply(rest, finer));
    any = bit_or(any, q);
    second_sum = add_int32(second_sum, q);
    store_shorts(second + i, narrow_signed(q), stride - i);
  }
  scale.scale[1] = power_of_two(exponent2);
  scale.sum[1] = reduce_add(second_sum);
  if (any_bit(any)) scale.limbs = Limbs::kTwo;
  return scale;
}

// Rows change places within 16 at most.
struct QuadOrder {
  alignas(16) uint8_t rows[16];
  constexpr explicit QuadOrder(int bits) : rows() {
    const int values = layout::block_values(bits) < 16 ? layout::block_values(bits) : 16;
    for (int i = 0; i < 16; ++i) rows[i] = static_cast<uint8_t>(i / values * values + quad_order(bits, i % values));
  }
};

template <int bits>
constexpr QuadOrder kQuadOrder{bits};

EXLLAMA_VECTOR inline void pack_bytes(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out) {
  const uint8_t* order = nullptr;
  layout::with_bits(bits, [&](auto known) { order = kQuadOrder<known.value>.rows; });
  const Bytes in_quads = load_bytes(order);
  for (int k = 0; k < rows; k += 16) pack_16_bytes(limb + k, rows - k, shift, offset, in_quads, out + k);
}

}  // namespace
}  // namespace exllama::cpu
