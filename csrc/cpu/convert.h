// float16, bfloat16 <-> float32 in plain C++: bit for bit what the vector instructions give, subnormals included.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/cpu.h"

namespace exllama::cpu {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^exponent for -149 <= exponent <= 127.
inline float power_of_two(int exponent) {
  return bits_float(exponent >= -126 ? static_cast<uint32_t>(exponent + 127) << 23 : 1u << (exponent + 149));
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above
  if (magnitude < 0x38800000) {
    // Below 2^-14 halves are multiples of 2^-24: adding 0.5 leaves just those bits, rounded to nearest even.
    return sign | static_cast<uint16_t>(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);  // 65520 and above carry into infinity
}

inline float bfloat_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

using layout::bytes_of;

inline float load_float(const void* values, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t value = static_cast<const uint16_t*>(values)[i];
  return dtype == DType::kFloat16 ? half_to_float(value) : bfloat_to_float(value);
}

inline void store_float(float value, void* values, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[i] = value;
  } else {
    static_cast<uint16_t*>(values)[i] = dtype == DType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

inline const void* offset(const void* values, DType dtype, int64_t i) {
  return static_cast<const char*>(values) + i * bytes_of(dtype);
}
inline void* offset(void* values, DType dtype, int64_t i) { return static_cast<char*>(values) + i * bytes_of(dtype); }

}  // namespace exllama::cpu
