// Some rows of x by a panel of words, in float: q - z is made in registers for each run of rows again.
//
// Where sums and products have units of their own, as on Zen 4, this takes no time beside the products. A panel of
// floats is eight times as large as 4-bit words, fills L1, and takes a store for each vector.
#pragma once

#include "cpu/generic/float-words-inl.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// acc += mr rows of x, from `row` on, by the words. Each block of words takes one of `shares` shares of what is ahead.
template <int bits, int mr>
EXLLAMA_VECTOR void add_word_rows(const Multiply<float, uint32_t>& args, int row, Ahead& ahead, int shares) {
  constexpr int nr = 2, kWords = layout::block_words(bits), kValues = layout::block_values(bits);
  const RowsOfX<mr> x(args.x + row * args.x_stride, args.x_stride);
  const Mask all = mask_of(kStrip);
  for (int strip = 0; strip * kStrip < args.columns; strip += nr) {
    const int column = strip * kStrip;
    FloatZeros zeros[nr];
    Float sum[mr][nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      zeros[v] = float_zeros<bits>(load_int(args.zeros + column + kStrip * v));
#pragma GCC unroll 12
      for (int m = 0; m < mr; ++m) sum[m][v] = set_float(0);
    }
    // The next rows of x and of acc come from L2.
    const bool more = args.rows - row >= 2 * mr;
    const char* next_x = reinterpret_cast<const char*>(args.x + (row + (more ? mr : 0)) * args.x_stride);
    const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + (more ? mr : 0)) * kPanelColumns);
    const uint32_t* words = args.panel + column;
    for (int k = 0; k < args.depth; k += kValues, words += kWords * kPanelColumns) {
      if (more && strip == 0) {
        for (int i = 0; i < kValues; ++i, next_x += 64, next_acc += 64) {
          prefetch_to_l1(next_x);
          prefetch_to_l1(next_acc);
        }
      }
      ahead.prefetch(shares--);
      Int loaded[nr][kWords];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) load_block<bits>(words + kStrip * v, kPanelColumns, all, loaded[v]);
      add_block<bits, mr, nr>(loaded, zeros, x, k, sum);
    }
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      const Float scale = load_floats(args.scales + column + kStrip * v);
      float* acc = args.acc + row * kPanelColumns + column + kStrip * v;
#pragma GCC unroll 12
      for (int m = 0; m < mr; ++m, acc += kPanelColumns) store_floats(acc, fma(sum[m][v], scale, load_floats(acc)));
    }
  }
}

// `rows` rows, at most mr. Even passes of more than kGemvRows rows take at least half of kTallRows each.
template <int bits, int mr>
void add_some_word_rows(const Multiply<float, uint32_t>& args, int row, int rows, Ahead& ahead, int shares) {
  static_assert(kGemvRows + 1 >= kTallRows / 2);
  if (rows == mr) return add_word_rows<bits, mr>(args, row, ahead, shares);
  if constexpr (mr > kTallRows / 2) add_some_word_rows<bits, mr - 1>(args, row, rows, ahead, shares);
}

inline void multiply_panel_of_words(const Multiply<float, uint32_t>& args, int bits, Ahead& ahead) {
  const int passes = (args.rows + kTallRows - 1) / kTallRows;
  const int strips = (args.columns + kStrip - 1) / kStrip;
  layout::with_bits(bits, [&](auto width) {
    const int shares = (strips + 1) / 2 * (args.depth / layout::block_values(width.value));
    for (int pass = 0; pass < passes; ++pass) {
      const int row = args.rows * pass / passes, rows = args.rows * (pass + 1) / passes - row;
      add_some_word_rows<width.value, kTallRows>(args, row, rows, ahead, shares * (passes - pass));
    }
  });
}

}  // namespace
}  // namespace exllama::cpu
