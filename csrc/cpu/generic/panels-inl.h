// Panels of a weight: zero points, scales, and rows of words that become integers or floats.
#pragma once

#include "cpu/generic/words-inl.h"
#include "cpu/isa/scalar/kernels.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

constexpr int kStrips = kPanelColumns / kStrip;
// Strips that are unpacked together. The zero points and sums of 16 would fill all registers of NEON, and 4 are a line.
constexpr int kStripsAtOnce = kStrips > 8 ? 4 : kStrips;

template <int bits>
EXLLAMA_VECTOR void load_zeros_of(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  for (int n = 0; n < kPanelColumns; n += kStrip) {
    store_int(zeros + n, zeros_of_strip<bits>(weight, group, column + n, columns - n));
  }
}

inline void load_zeros(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  layout::with_bits(weight.bits, [&](auto bits) { load_zeros_of<bits.value>(weight, group, column, columns, zeros); });
}

EXLLAMA_VECTOR inline void load_scales(const Weight& weight, int64_t group, int64_t column, int columns,
                                       float* scales) {
  for (int n = 0; n < kPanelColumns; n += kStrip) {
    store_floats(scales + n, load_any(weight.scales, weight.scales_dtype, group * weight.N + column + n, columns - n));
  }
}

template <int bits>
EXLLAMA_VECTOR void unpack_int16_strips(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                        const int32_t* zeros, int16_t* panel) {
  constexpr int kWords = layout::block_words(bits), kPairs = layout::block_values(bits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  Int zero[kStripsAtOnce];
#pragma GCC unroll 8
  for (int v = 0; v < kStripsAtOnce; ++v) zero[v] = both_halves(load_int(zeros + kStrip * v));
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
#pragma GCC unroll 8
    for (int v = 0; v < kStripsAtOnce; ++v) {
      Int words[kWords];
      load_block<bits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        store_int(panel + 2 * (p * kPanelColumns + kStrip * v), sub_int16(pair_of<bits>(words, p), zero[v]));
      }
    }
  }
}

template <int bits>
void unpack_int16_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                     int16_t* panel) {
  for (int n = 0; n < kPanelColumns; n += kStripsAtOnce * kStrip) {
    unpack_int16_strips<bits>(weight, row, rows, column + n, columns - n, zeros + n, panel + 2 * n);
  }
}

inline void unpack_int16(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                         int16_t* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_int16(weight, row, rows, column, columns, zeros, panel);
  }
  layout::with_bits(weight.bits,
                    [&](auto bits) { unpack_int16_of<bits.value>(weight, row, rows, column, columns, zeros, panel); });
}

// q - z of 8 bits does not fit int8, and q - 128 does: x - 128 flips the highest bit.
template <int bits>
EXLLAMA_VECTOR void unpack_int8_strips(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                       const int32_t* zeros, int8_t* panel, int32_t* start) {
  static_assert(bits <= 8, "csrc/cpu has no int8 panel of values of more than 8 bits");
  constexpr int kWords = layout::block_words(bits), kQuads = layout::block_values(bits) / 4;
  const uint32_t* block = words_of(weight, row, column);
  const Int ones = set_int(0x01010101), offsets = set_int(static_cast<int32_t>(kInt8Offset * 0x01010101u));
  Int zero[kStripsAtOnce], sum[kStripsAtOnce];
#pragma GCC unroll 8
  for (int v = 0; v < kStripsAtOnce; ++v) {
    const Int twice = both_halves(load_int(zeros + kStrip * v));
    zero[v] = bits == 8 ? offsets : bit_or(twice, shift_left(twice, 8));
    sum[v] = set_int(0);
  }
  for (int i = 0; i < rows; i += 4 * kQuads, block += kWords * weight.N, panel += 4 * kQuads * kPanelColumns) {
#pragma GCC unroll 8
    for (int v = 0; v < kStripsAtOnce; ++v) {
      Int words[kWords];
      load_block<bits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 8
      for (int p = 0; p < kQuads; ++p) {
        const Int centered = sub_int8(quad_of<bits>(words, p), zero[v]);
        dot_int8(sum[v], ones, centered);
        store_int(panel + 4 * (p * kPanelColumns + kStrip * v), centered);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kStripsAtOnce; ++v) {
    store_int(start + kStrip * v, multiply_int32(sum[v], set_int(-kInt8Offset)));
  }
}

template <int bits>
void unpack_int8_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                    int8_t* panel, int32_t* start) {
  for (int n = 0; n < kPanelColumns; n += kStripsAtOnce * kStrip) {
    unpack_int8_strips<bits>(weight, row, rows, column + n, columns - n, zeros + n, panel + 4 * n, start + n);
  }
}

inline void unpack_int8(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                        int8_t* panel, int32_t* start) {
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_int8_of<bits.value>(weight, row, rows, column, columns, zeros, panel, start);
  });
}

template <int bits>
EXLLAMA_VECTOR void unpack_float_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kWords = layout::block_words(bits), kPairs = layout::block_values(bits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
    for (int v = 0; v < kStrips; ++v) {
      const Int zero = both_halves(load_int(zeros + kStrip * v));
      const Float scale = scales ? load_floats(scales + kStrip * v) : set_float(1);
      Int words[kWords];
      load_block<bits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        const Int value = sub_int16(pair_of<bits>(words, p), zero);
        float* out = panel + 2 * p * kPanelColumns + kStrip * v;
        store_floats(out, multiply(to_float(shift_right_signed(shift_left(value, 16), 16)), scale));
        store_floats(out + kPanelColumns, multiply(to_float(shift_right_signed(value, 16)), scale));
      }
    }
  }
}

inline void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                         const float* scales, float* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_float(weight, row, rows, column, columns, zeros, scales, panel);
  }
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_float_of<bits.value>(weight, row, rows, column, columns, zeros, scales, panel);
  });
}

}  // namespace
}  // namespace exllama::cpu
