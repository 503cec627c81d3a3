// A few rows of x by the words of a shuffled weight, in float.
//
// On Zen 4 arithmetic is the limit, not DRAM: with one row of x, 64 bytes of 4-bit words take 14.6 cycles, and 9 to
// read. So a few strips of columns go through all rows of a span, with their sums in registers. Each sum is a chain of
// operations of 4 cycles, so that one or two rows of x take four strips.
#pragma once

#include <algorithm>

#include "cpu/generic/float-words-inl.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 1 KiB of its row.
constexpr int kAheadColumns = 256;

// acc += mr rows of x by the rows of W of a span; `last`: no other follows.
template <int bits, int mr>
EXLLAMA_VECTOR void add_span(const Gemv& gemv, const Span& span, bool last, const float* x_of_span, float* acc) {
  constexpr int nr = mr <= 2 ? 4 : 2;
  constexpr int kWords = layout::block_words(bits), kValues = layout::block_values(bits);
  const Weight& weight = *gemv.weight;
  const int64_t N = weight.N, columns = gemv.columns, stride = round_up(columns, kPanelColumns), step = kWords * N;
  const uint32_t* first = words_of(weight, span.row, gemv.column);
  const uint32_t* next = last ? first : words_of(weight, span.row + span.rows, gemv.column);
  const RowsOfX<mr> x(x_of_span, gemv.x_stride);
  for (int64_t n = 0; n < columns; n += kStrip * nr) {
    const int64_t after = n + kAheadColumns;
    const uint32_t* ahead = after < columns ? first + after : next + (after - columns);
    const uint32_t* words = first + n;
    Mask mask[nr];
    FloatZeros zeros[nr];
    Float sum[mr][nr];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) {
      const int64_t column = n + kStrip * v;
      mask[v] = mask_of(columns - column);
      zeros[v] = float_zeros<bits>(zeros_of_strip<bits>(weight, span.group, gemv.column + column, columns - column));
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) sum[m][v] = set_float(0);
    }
    for (int k = 0; k < span.rows; k += kValues, words += step, ahead += step) {
      Int loaded[nr][kWords];
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) {
        if (kStrip * v % 16 == 0) {  // once a line
          for (int w = 0; w < kWords; ++w) prefetch_to_l1(ahead + w * N + kStrip * v);
        }
        load_block<bits>(words + kStrip * v, N, mask[v], loaded[v]);
      }
      add_block<bits, mr, nr>(loaded, zeros, x, k, sum);
    }
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) {
      const int64_t column = n + kStrip * v, index = span.group * N + gemv.column + column;
      const Float scale = load_any(weight.scales, weight.scales_dtype, index, columns - column);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        float* out = acc + m * stride + column;
        store_floats(out, fma(sum[m][v], scale, load_floats(out)));
      }
    }
  }
}

// `rows` rows of x, at most mr.
template <int bits, int mr>
void add_span_of(int rows, const Gemv& gemv, const Span& span, bool last, const float* x, float* acc) {
  if (rows == mr) return add_span<bits, mr>(gemv, span, last, x, acc);
  if constexpr (mr > 1) add_span_of<bits, mr - 1>(rows, gemv, span, last, x, acc);
}

template <int bits>
void run_float(const Gemv& gemv) {
  const Spans spans(*gemv.weight, kSpanRows);
  // Even passes: the words of all but the first come from a cache.
  const int passes = (gemv.rows + kGemvVectors - 1) / kGemvVectors;
  for (int64_t s = 0; s < spans.count(); ++s) {
    const float* x = static_cast<const float*>(gemv.x) + s * gemv.rows * gemv.x_stride;
    for (int pass = 0; pass < passes; ++pass) {
      const int begin = gemv.rows * pass / passes, end = gemv.rows * (pass + 1) / passes;
      add_span_of<bits, kGemvVectors>(end - begin, gemv, spans[s], s + 1 == spans.count(), x + begin * gemv.x_stride,
                                      gemv.acc + begin * round_up(gemv.columns, kPanelColumns));
    }
  }
}

inline void multiply_words_as_floats(const Gemv& gemv) {
  layout::with_bits(gemv.weight->bits, [&](auto bits) { run_float<bits.value>(gemv); });
}

}  // namespace
}  // namespace exllama::cpu
