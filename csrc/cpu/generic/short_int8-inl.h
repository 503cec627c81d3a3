// int8 panels of at most 4 bits without VNNI: two products fit int16, and so do the sums of a run of rows.
//
// The panel holds q, which is unsigned, and x is signed. A lane of 16 bits takes half of the rows of a run: 16 products of
// at most 15 * 127, which are 30480 < 2^15. With q of 8 bits the first two may be 2 * 255 * 127 >= 2^15, so that such
// weights go through the int16 panel.
#pragma once

#include "cpu/generic/product-inl.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

template <int bits>
EXLLAMA_VECTOR void unpack_plain_int8_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                         int8_t* panel) {
  constexpr int kWords = layout::block_words(bits), kQuads = layout::block_values(bits) / 4;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 4 * kQuads, block += kWords * weight.N, panel += 4 * kQuads * kPanelColumns) {
#pragma GCC unroll 8
    for (int n = 0; n < kPanelColumns; n += kStrip) {
      Int words[kWords];
      load_block<bits>(block + n, weight.N, mask_of(columns - n), words);
#pragma GCC unroll 8
      for (int p = 0; p < kQuads; ++p) store_int(panel + 4 * (p * kPanelColumns + n), quad_of<bits>(words, p));
    }
  }
}

inline void unpack_plain_int8(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t*,
                              int8_t* panel, int32_t*) {
  layout::with_bits(weight.bits,
                    [&](auto bits) { unpack_plain_int8_of<bits.value>(weight, row, rows, column, columns, panel); });
}

struct ShortInt8Product {
  using Args = Multiply<uint8_t, int8_t>;
  using Vector = Int;
  using Sum = Int;
  static constexpr int kDepth = 4, kStrips = 2, kRunRows = 32;

  static EXLLAMA_VECTOR_INLINE Int start(const Args& args, int row, int column) {
    return multiply_int32(load_int(args.zeros + column), set_int(-args.x_scales[row].sum[0]));
  }
  static EXLLAMA_VECTOR_INLINE Int load(const int8_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const uint8_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Int& sum, Int weight, Int x) { dot_int8_short(sum, weight, x); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Int sum, int row, int) {
    return multiply(to_float(sum), set_float(args.x_scales[row].scale[0]));
  }
};

inline void use_short_int8(Kernels& table) {
  table.int8_panels = Int8Panels::kPlain;
  table.unpack_int8 = unpack_plain_int8;
  table.multiply_int8 = multiply_rows<ShortInt8Product>;
}

}  // namespace
}  // namespace exllama::cpu
