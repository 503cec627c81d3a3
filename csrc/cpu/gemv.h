// A few rows of x by the words of a shuffled weight: written once, like vectors.h, and included after a vocabulary by
// one source for each vector width.
//
// DRAM is the limit: 16 columns of 4-bit words are 64 bytes, 3.8 ns at 17 GB/s, and take 4 dot products per row of x,
// 4 ands and 3 shifts of AVX-512. So words are read as DRAM likes it best, a few long rows at a time with prefetches
// into L1 that run ahead of the use, and the sums of a block's columns wait in L1 from one batch of rows to the next.
#pragma once

#include "../layout/dispatch.h"
#include "blocks.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 1 KiB of its row.
constexpr int kAheadColumns = 256;
// Strips that share a broadcast of x.
constexpr int nr = 2;
// Rows of W in a batch: half a block, eight rows of 4-bit words, so that sums go to memory once for them; more streams
// at a time than eight or so would read slower. The last batch of a block may have fewer.
constexpr int kBatchRows = 64;

// What a lane of 32 bits multiplies at once: two int16 or four int8.
enum class Dot { kInt16, kInt16Vnni, kInt8 };
constexpr int depth_of(Dot dot) { return dot == Dot::kInt8 ? 4 : 2; }

// One limb of one row of x in one block.
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
  bool last;  // of its block of rows
};

// What the last batch of a block needs to turn integers into sums.
struct Target {
  const Weight& weight;
  int64_t group;
  int64_t column;
};

// Adds a batch of `blocks` blocks of values to the integer sums dots[vector][column]; the last batch of a block of rows
// goes on to acc = fma(float(dot - zero * sum of x) * x_scale, scale, acc), and leaves zeros for the next block. `next` is
// where the next batch begins, `x` has the vectors' terms, 32 bits each, as [term][vector].
template <int kBits, Dot kDot, int mr>
EXLLAMA_VECTOR void add_batch(const Batch& batch, int64_t N, int columns, const int32_t* x, int32_t* dots,
                              const Vector* vectors, const Target& target) {
  constexpr int kWords = layout::block_words(kBits), kTerms = layout::block_values(kBits) / depth_of(kDot);
  const int64_t stride = round_up(columns, kStrip * nr);
  for (int n = 0; n < columns; n += kStrip * nr) {
    const uint32_t* ahead =
        n + kAheadColumns < columns ? batch.words + n + kAheadColumns : batch.next + (n + kAheadColumns - columns);
    const uint32_t* words = batch.words + n;
    const int32_t* terms = x;
    Mask mask[nr];
    Int dot[mr][nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      mask[v] = mask_of(columns - n - kStrip * v);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) dot[m][v] = load_int(dots + m * stride + n + kStrip * v);
    }
    for (int i = 0; i < batch.blocks; ++i, words += kWords * N, ahead += kWords * N, terms += kTerms * mr) {
      Int loaded[nr][kWords];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 3
        for (int w = 0; w < kWords && kStrip * v % 16 == 0; ++w) {  // once a line
          _mm_prefetch(reinterpret_cast<const char*>(ahead + w * N + kStrip * v), _MM_HINT_T0);
        }
        load_block<kBits>(words + kStrip * v, N, mask[v], loaded[v]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTerms; ++t) {
        Int term[nr];
#pragma GCC unroll 2
        for (int v = 0; v < nr; ++v) {
          term[v] = kDot == Dot::kInt8 ? quad_of<kBits>(loaded[v], t) : pair_of<kBits>(loaded[v], t);
        }
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) {
          const Int spread = broadcast(terms + t * mr + m);
#pragma GCC unroll 2
          for (int v = 0; v < nr; ++v) {
            if constexpr (kDot == Dot::kInt8) {
              dot_int8(dot[m][v], term[v], spread);
            } else {
              dot_int16<kDot == Dot::kInt16Vnni>(dot[m][v], term[v], spread);
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      if (!batch.last) {
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) store_int(dots + m * stride + n + kStrip * v, dot[m][v]);
        continue;
      }
      const int64_t column = target.column + n + kStrip * v, there = columns - n - kStrip * v;
      const Int zero = zeros_of_strip<kBits>(target.weight, target.group, column, there);
      const Float scale = load_any(target.weight.scales, target.weight.scales_dtype,
                                   target.group * target.weight.N + column, there);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const Vector& vector = vectors[m];
        const Int centered = sub_int32(dot[m][v], multiply_int32(zero, set_int(vector.sum)));
        const Float value = multiply(to_float(centered), set_float(vector.scale));
        float* out = vector.acc + n + kStrip * v;
        store_floats_masked(out, mask[v], fma(value, scale, load_floats_masked(out, mask[v])));
        store_int(dots + m * stride + n + kStrip * v, set_int(0));
      }
    }
  }
}

// `count` vectors, at most mr.
template <int kBits, Dot kDot, int mr>
void add_batch_of(int count, const Batch& batch, int64_t N, int columns, const int32_t* x, int32_t* dots,
                  const Vector* vectors, const Target& target) {
  if (count == mr) return add_batch<kBits, kDot, mr>(batch, N, columns, x, dots, vectors, target);
  if constexpr (mr > 1) add_batch_of<kBits, kDot, mr - 1>(count, batch, N, columns, x, dots, vectors, target);
}

template <int kBits, Dot kDot>
void add_vectors(const Batch& batch, int64_t N, int columns, int row, const Vector* vectors, int count, int32_t* dots,
                 const Target& target) {
  constexpr int kMostTerms = kBatchRows / depth_of(kDot);
  const int terms = batch.blocks * layout::block_values(kBits) / depth_of(kDot);
  // Even passes: the words of all but the first come from L1.
  const int passes = (count + kGemvVectors - 1) / kGemvVectors;
  for (int pass = 0; pass < passes; ++pass) {
    const int begin = count * pass / passes, mr = count * (pass + 1) / passes - begin;
    int32_t x[kMostTerms * kGemvVectors];
    for (int m = 0; m < mr; ++m) {
      const char* from = vectors[begin + m].x + row / depth_of(kDot) * 4;
      for (int t = 0; t < terms; ++t) std::memcpy(&x[t * mr + m], from + 4 * t, sizeof(int32_t));
    }
    add_batch_of<kBits, kDot, kGemvVectors>(mr, batch, N, columns, x, dots + begin * round_up(columns, kStrip * nr),
                                            vectors + begin, target);
  }
}

// The rows of a block, in batches.
template <int kBits, Dot kDot>
void add_batches(const Gemv& gemv, const Block& block, bool last, const Vector* vectors, int count, int32_t* dots) {
  constexpr int kValues = layout::block_values(kBits), kWords = layout::block_words(kBits);
  const Target target{*gemv.weight, block.group, gemv.column};
  const int64_t N = gemv.weight->N;
  const uint32_t* words = words_of(*gemv.weight, block.row, gemv.column);
  for (int row = 0, rows; row < block.rows; row += rows) {
    rows = std::min<int>(kBatchRows, block.rows - row);
    const int blocks = rows / kValues;
    const uint32_t* end = words + blocks * kWords * N;
    const bool last_batch = row + rows == block.rows;
    const Batch batch{words, last && last_batch ? words : end, blocks, last_batch};
    add_vectors<kBits, kDot>(batch, N, gemv.columns, row, vectors, count, dots, target);
    words = end;
  }
}

template <int kBits, Dot kDot>
void run(const Gemv& gemv) {
  const Blocks blocks(*gemv.weight, kBlockRows);
  // Two limbs for each row at most.
  alignas(64) int32_t dots[2 * kGemvSums];
  std::memset(dots, 0, sizeof(int32_t) * 2 * gemv.rows * round_up(gemv.columns, kStrip * nr));
  Vector vectors[2 * kGemvRows];
  for (int64_t b = 0; b < blocks.count(); ++b) {
    int count = 0;
    for (int m = 0; m < gemv.rows; ++m) {
      const int64_t entry = b * gemv.rows + m;
      const BlockScale& scale = gemv.x_scales[entry];
      const char* x = static_cast<const char*>(gemv.x) + entry * gemv.x_stride * (4 / depth_of(kDot));
      float* acc = gemv.acc + m * gemv.columns;
      vectors[count++] = {x, scale.sum[0], scale.scale[0], acc};
      if (scale.limbs == Limbs::kTwo) {
        const int16_t* second = gemv.x_second + entry * gemv.x_stride;
        vectors[count++] = {reinterpret_cast<const char*>(second), scale.sum[1], scale.scale[1], acc};
      }
    }
    add_batches<kBits, kDot>(gemv, blocks[b], b + 1 == blocks.count(), vectors, count, dots);
  }
}

template <Dot kDot>
void gemv(const Gemv& gemv) {
  layout::with_bits(gemv.weight->bits, [&](auto bits) { run<bits.value, kDot>(gemv); });
}

}  // namespace
}  // namespace exllama::cpu
