// The kernels in plain C++, which the vector kernels also call where vectors do not fit.
#pragma once

#include "cpu/convert.h"
#include "cpu/kernels.h"

namespace exllama::cpu::scalar {

void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out);
bool store(const float* values, int count, void* out, DType dtype);
SpanScale quantize(const void* x, DType dtype, const int32_t* perm, const Span& span, int stride, int limit,
                   int16_t* first, int16_t* second);
// The same for a span that `load` has loaded.
SpanScale quantize_values(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second);
void load_zeros(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros);
void load_scales(const Weight& weight, int64_t group, int64_t column, int columns, float* scales);
void unpack_int16(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  int16_t* panel);
void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  const float* scales, float* panel);
void unpack_transposed(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       const float* scales, float* panel);
void multiply_int16(const Multiply<int16_t, int16_t>& multiply, Ahead& ahead);
void multiply_float(const Multiply<float, float>& multiply, Ahead& ahead);
void pack_bytes(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out);

// The exponent of the power-of-two scale of a span whose largest |x| is finite and has the bits `largest`.
inline int scale_exponent(uint32_t largest, int limit) {
  // The float of 2^15 - 1 (2^7 - 1) has 15 (7) leading ones. What is above them would round to 2^15 (2^7), and the
  // addition carries it into the next exponent.
  const bool wide = limit == 32767;
  const bool subnormal = largest < 1u << 23;
  if (subnormal) largest = float_bits(bits_float(largest) * 0x1p64f);
  const int exponent = static_cast<int>((largest + (wide ? 0x1ff : 0x1ffff)) >> 23) - 127 - (wide ? 14 : 6);
  if (!subnormal) return exponent;
  return exponent - 64 < -149 ? -149 : exponent - 64;  // every float is a multiple of 2^-149
}

// The exponent of the second limb's scale: 15 bits finer, or what a float can still express, which is all that x has.
inline int second_exponent(int exponent) { return exponent - 15 < -149 ? -149 : exponent - 15; }

// Whether a span needs a second limb: max|x| > 16 mean|x|. The integers answer it, so that the order of a sum does not
// matter. 15 makes up for their rounding, which moves 16 mean|x| / s by 8 and max|x| / s >= 2^14 by a half.
inline bool has_outlier(int rows, int64_t largest, int64_t sum) { return rows * largest > 15 * sum; }

}  // namespace exllama::cpu::scalar
