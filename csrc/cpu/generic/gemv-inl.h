// A few rows of x by the words of a shuffled weight.
//
// DRAM is the limit. 16 columns of 4-bit words are 64 bytes, which take 3.8 ns at 17 GB/s. AVX-512 unpacks them by 4 ands
// and 3 shifts, and multiplies them by 4 dot products per row of x. So words are read as DRAM likes it best: a few long rows at a time, with prefetches
// into L1 that run ahead of the use. The sums of a span's columns wait in L1 from one batch of rows to the next.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/generic/words-inl.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 1 KiB of its row.
constexpr int kAheadColumns = 256;
// Strips that share a broadcast of x.
constexpr int nr = 2;
// Rows of W in a batch, for which sums go to memory once: half a span, which is eight rows of 4-bit words. More streams
// at a time than eight or so would read slower. The last batch of a span may have fewer.
constexpr int kBatchRows = 64;

// What a lane of 32 bits multiplies at once: two int16 or four int8.
enum class Dot { kInt16, kInt16Vnni, kInt8 };
constexpr int depth_of(Dot kind) { return kind == Dot::kInt8 ? 4 : 2; }

// A sum of such products, from `start` on.
template <Dot kind>
EXLLAMA_VECTOR_INLINE auto sum_from(Int start) {
  if constexpr (kind == Dot::kInt8) {
    return start;
  } else {
    return pair_sum(start);
  }
}

// One limb of one row of x in one span.
struct Vector {
  const char* x;
  int32_t sum;
  float scale;
  float* acc;
};

// Rows of words that are read together, and where the next ones begin.
struct Batch {
  const uint32_t* words;
  const uint32_t* next;
  int blocks;
  bool last;  // of its span
};

// What the last batch of a span needs to turn integers into sums.
struct Target {
  const Weight& weight;
  int64_t group;
  int64_t column;
};

// Adds a batch to the integer sums dots[vector][column]. The last batch of a span goes on to
// acc = fma(float(dot - zero * sum of x) * x_scale, scale, acc), and leaves zeros for the next span. `x` has the terms of
// the vectors, 32 bits each, as [term][vector].
template <int bits, Dot kind, int mr>
EXLLAMA_VECTOR void add_batch(const Batch& batch, int64_t N, int columns, const int32_t* x, int32_t* dots,
                              const Vector* vectors, const Target& target) {
  constexpr int kWords = layout::block_words(bits), kTerms = layout::block_values(bits) / depth_of(kind);
  // q - 128 of 8 bits, where dot products take signed bytes.
  constexpr bool flips = kSignedDots && kind == Dot::kInt8 && bits == 8;
  const int64_t stride = round_up(columns, kStrip * nr);
  for (int n = 0; n < columns; n += kStrip * nr) {
    const uint32_t* ahead =
        n + kAheadColumns < columns ? batch.words + n + kAheadColumns : batch.next + (n + kAheadColumns - columns);
    const uint32_t* words = batch.words + n;
    const int32_t* terms = x;
    Mask mask[nr];
    decltype(sum_from<kind>(Int())) sum[mr][nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      mask[v] = mask_of(columns - n - kStrip * v);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) sum[m][v] = sum_from<kind>(load_int(dots + m * stride + n + kStrip * v));
    }
    for (int i = 0; i < batch.blocks; ++i, words += kWords * N, ahead += kWords * N, terms += kTerms * mr) {
      Int loaded[nr][kWords];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
        if (kStrip * v % 16 == 0) {  // once a line
          for (int w = 0; w < kWords; ++w) prefetch_to_l1(ahead + w * N + kStrip * v);
        }
        load_block<bits>(words + kStrip * v, N, mask[v], loaded[v]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTerms; ++t) {
        Int term[nr];
#pragma GCC unroll 2
        for (int v = 0; v < nr; ++v) {
          term[v] = kind == Dot::kInt8 ? quad_of<bits>(loaded[v], t) : pair_of<bits>(loaded[v], t);
          if constexpr (flips) term[v] = sub_int8(term[v], set_int(static_cast<int32_t>(0x80808080)));
        }
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) {
          const Int spread = broadcast(terms + t * mr + m);
#pragma GCC unroll 2
          for (int v = 0; v < nr; ++v) {
            if constexpr (kind == Dot::kInt8) {
              dot_int8(sum[m][v], term[v], spread);
            } else {
              dot_int16<kind == Dot::kInt16Vnni>(sum[m][v], term[v], spread);
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      if (!batch.last) {
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) store_int(dots + m * stride + n + kStrip * v, whole(sum[m][v]));
        continue;
      }
      const int64_t column = target.column + n + kStrip * v, there = columns - n - kStrip * v;
      Int zero = zeros_of_strip<bits>(target.weight, target.group, column, there);
      if constexpr (flips) zero = sub_int32(zero, set_int(kInt8Offset));
      const Float scale =
          load_any(target.weight.scales, target.weight.scales_dtype, target.group * target.weight.N + column, there);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const Vector& vector = vectors[m];
        const Int centered = sub_int32(whole(sum[m][v]), multiply_int32(zero, set_int(vector.sum)));
        const Float value = multiply(to_float(centered), set_float(vector.scale));
        float* out = vector.acc + n + kStrip * v;
        store_floats_masked(out, mask[v], fma(value, scale, load_floats_masked(out, mask[v])));
        store_int(dots + m * stride + n + kStrip * v, set_int(0));
      }
    }
  }
}

// `count` vectors, at most mr.
template <int bits, Dot kind, int mr>
void add_batch_of(int count, const Batch& batch, int64_t N, int columns, const int32_t* x, int32_t* dots,
                  const Vector* vectors, const Target& target) {
  if (count == mr) return add_batch<bits, kind, mr>(batch, N, columns, x, dots, vectors, target);
  if constexpr (mr > 1) add_batch_of<bits, kind, mr - 1>(count, batch, N, columns, x, dots, vectors, target);
}

template <int bits, Dot kind>
void add_vectors(const Batch& batch, int64_t N, int columns, int row, const Vector* vectors, int count, int32_t* dots,
                 const Target& target) {
  constexpr int kMostTerms = kBatchRows / depth_of(kind);
  const int terms = batch.blocks * layout::block_values(bits) / depth_of(kind);
  // Even passes: the words of all but the first come from L1.
  const int passes = (count + kGemvVectors - 1) / kGemvVectors;
  for (int pass = 0; pass < passes; ++pass) {
    const int begin = count * pass / passes, mr = count * (pass + 1) / passes - begin;
    int32_t x[kMostTerms * kGemvVectors];
    for (int m = 0; m < mr; ++m) {
      const char* from = vectors[begin + m].x + row / depth_of(kind) * 4;
      for (int t = 0; t < terms; ++t) std::memcpy(&x[t * mr + m], from + 4 * t, sizeof(int32_t));
    }
    add_batch_of<bits, kind, kGemvVectors>(mr, batch, N, columns, x, dots + begin * round_up(columns, kStrip * nr),
                                           vectors + begin, target);
  }
}

// The rows of a span, in batches.
template <int bits, Dot kind>
void add_batches(const Gemv& gemv, const Span& span, bool last, const Vector* vectors, int count, int32_t* dots) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  const Target target{*gemv.weight, span.group, gemv.column};
  const int64_t N = gemv.weight->N;
  const uint32_t* words = words_of(*gemv.weight, span.row, gemv.column);
  for (int row = 0, rows; row < span.rows; row += rows) {
    rows = std::min<int>(kBatchRows, span.rows - row);
    const int blocks = rows / kValues;
    const uint32_t* end = words + blocks * kWords * N;
    const bool last_batch = row + rows == span.rows;
    const Batch batch{words, last && last_batch ? words : end, blocks, last_batch};
    add_vectors<bits, kind>(batch, N, gemv.columns, row, vectors, count, dots, target);
    words = end;
  }
}

template <int bits, Dot kind>
void run(const Gemv& gemv) {
  const Spans spans(*gemv.weight, kSpanRows);
  // Two limbs for each row at most.
  alignas(64) int32_t dots[2 * kGemvSums];
  std::memset(dots, 0, sizeof(int32_t) * 2 * gemv.rows * round_up(gemv.columns, kStrip * nr));
  Vector vectors[2 * kGemvRows];
  for (int64_t s = 0; s < spans.count(); ++s) {
    int count = 0;
    for (int m = 0; m < gemv.rows; ++m) {
      const int64_t entry = s * gemv.rows + m;
      const SpanScale& scale = gemv.x_scales[entry];
      const char* x = static_cast<const char*>(gemv.x) + entry * gemv.x_stride * (4 / depth_of(kind));
      float* acc = gemv.acc + m * gemv.columns;
      vectors[count++] = {x, scale.sum[0], scale.scale[0], acc};
      if (scale.limbs == Limbs::kTwo) {
        const int16_t* second = gemv.x_second + entry * gemv.x_stride;
        vectors[count++] = {reinterpret_cast<const char*>(second), scale.sum[1], scale.scale[1], acc};
      }
    }
    add_batches<bits, kind>(gemv, spans[s], s + 1 == spans.count(), vectors, count, dots);
  }
}

template <Dot kind>
void multiply_words(const Gemv& gemv) {
  layout::with_bits(gemv.weight->bits, [&](auto bits) { run<bits.value, kind>(gemv); });
}

}  // namespace
}  // namespace exllama::cpu
