// A few rows of x by the words of a shuffled weight, for AVX-512.
//
// DRAM is the limit: 16 columns of 4-bit words are 64 bytes, 3.8 ns at 17 GB/s, and take 4 dot products per row of x,
// 4 ands and 3 shifts. So words are read as DRAM likes it best, a few long rows at a time with prefetches into L1 that
// run ahead of the use, and the sums of a block's columns wait in L1 from one batch of rows to the next.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx512.h"
#include "blocks.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 1 KiB of its row.
constexpr int kAheadColumns = 256;
// Vectors of x that share an unpacked word, and strips that share a broadcast of x: of 32 registers the sums take 16,
// the terms of 4-bit words 8.
constexpr int kMaxVectors = 8, nr = 2;
// Rows of W in a batch: half a block, eight rows of 4-bit words, so that sums go to memory once for them; more streams
// at a time than eight or so would read slower. Groups of 32 take the smaller batch.
constexpr int kBatchRows = 64, kSmallBatchRows = 32;

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

// What the last batch of a block needs to turn integers into sums.
struct Target {
  const Weight& weight;
  int64_t group;
  int64_t column;
};

// Adds `kBlocks` blocks of values, a batch, to the integer sums dots[vector][column]; the last batch of a block goes on
// to acc = fma(float(dot - zero * sum of x) * x_scale, scale, acc), and leaves zeros for the next block. `next` is where
// the next batch begins, `x` has the vectors' terms, 32 bits each, as [term][vector].
template <int kBits, Dot kDot, int mr, int kBlocks, bool kLast>
EXLLAMA_VECTOR void add_batch(const uint32_t* words, int64_t N, int columns, const uint32_t* next, const int32_t* x,
                              int32_t* dots, const Vector* vectors, const Target& target) {
  constexpr int kWords = layout::block_words(kBits), kTerms = layout::block_values(kBits) / depth_of(kDot);
  const int64_t stride = round_up(columns, 16 * nr);
  for (int n = 0; n < columns; n += 16 * nr) {
    const uint32_t* ahead =
        n + kAheadColumns < columns ? words + n + kAheadColumns : next + (n + kAheadColumns - columns);
    __mmask16 mask[nr];
    __m512i dot[mr][nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 16
      for (int w = 0; w < kBlocks * kWords; ++w) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + w * N + 16 * v), _MM_HINT_T0);
      }
      mask[v] = mask_of(columns - n - 16 * v);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) dot[m][v] = _mm512_loadu_si512(dots + m * stride + n + 16 * v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBlocks; ++i) {
      __m512i loaded[kWords], term[nr][kTerms];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 3
        for (int w = 0; w < kWords; ++w) {
          loaded[w] = _mm512_maskz_loadu_epi32(mask[v], words + (i * kWords + w) * N + n + 16 * v);
        }
        if constexpr (kDot == Dot::kInt8) {
          split_quads<kBits>(loaded, term[v]);
        } else {
          split_pairs<kBits>(loaded, term[v]);
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTerms; ++t) {
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) {
          const __m512i spread = broadcast(x + (i * kTerms + t) * mr + m);
#pragma GCC unroll 2
          for (int v = 0; v < nr; ++v) {
            if constexpr (kDot == Dot::kInt8) {
              dot_int8(dot[m][v], term[v][t], spread);
            } else {
              dot_int16<kDot == Dot::kInt16Vnni>(dot[m][v], term[v][t], spread);
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      if (!kLast) {
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) _mm512_storeu_si512(dots + m * stride + n + 16 * v, dot[m][v]);
        continue;
      }
      const int64_t column = target.column + n + 16 * v;
      const __m512i zero = zeros_of_strip<kBits>(target.weight, target.group, column, mask[v]);
      const __m512 scale = scales_of_strip(target.weight, target.group, column, mask[v]);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const Vector& vector = vectors[m];
        const __m512i centered = _mm512_sub_epi32(dot[m][v], _mm512_mullo_epi32(zero, _mm512_set1_epi32(vector.sum)));
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(centered), _mm512_set1_ps(vector.scale));
        float* out = vector.acc + n + 16 * v;
        const __m512 acc = _mm512_maskz_loadu_ps(mask[v], out);
        _mm512_mask_storeu_ps(out, mask[v], _mm512_fmadd_ps(value, scale, acc));
        _mm512_storeu_si512(dots + m * stride + n + 16 * v, _mm512_setzero_si512());
      }
    }
  }
}

using Batch = void (*)(const uint32_t*, int64_t, int, const uint32_t*, const int32_t*, int32_t*, const Vector*,
                       const Target&);

template <int kBits, Dot kDot, int kBlocks, bool kLast>
void add_vectors(const uint32_t* words, int64_t N, int columns, const uint32_t* next, int row, const Vector* vectors,
                 int count, int32_t* dots, const Target& target) {
  constexpr int kTerms = kBlocks * layout::block_values(kBits) / depth_of(kDot);
  static constexpr Batch kBatches[kMaxVectors] = {
      add_batch<kBits, kDot, 1, kBlocks, kLast>, add_batch<kBits, kDot, 2, kBlocks, kLast>,
      add_batch<kBits, kDot, 3, kBlocks, kLast>, add_batch<kBits, kDot, 4, kBlocks, kLast>,
      add_batch<kBits, kDot, 5, kBlocks, kLast>, add_batch<kBits, kDot, 6, kBlocks, kLast>,
      add_batch<kBits, kDot, 7, kBlocks, kLast>, add_batch<kBits, kDot, 8, kBlocks, kLast>,
  };
  // Even passes: the words of all but the first come from L1.
  const int passes = (count + kMaxVectors - 1) / kMaxVectors;
  for (int pass = 0; pass < passes; ++pass) {
    const int begin = count * pass / passes, mr = count * (pass + 1) / passes - begin;
    int32_t x[kTerms * kMaxVectors];
    for (int m = 0; m < mr; ++m) {
      const char* from = vectors[begin + m].x + row / depth_of(kDot) * 4;
      for (int t = 0; t < kTerms; ++t) std::memcpy(&x[t * mr + m], from + 4 * t, sizeof(int32_t));
    }
    kBatches[mr - 1](words, N, columns, next, x, dots + begin * round_up(columns, 16 * nr), vectors + begin, target);
  }
}

// The rows of a block from `row` on, in batches of kBlocks blocks of values while they last, then in smaller ones.
template <int kBits, Dot kDot, int kBlocks>
void add_batches(const Gemv& gemv, const Block& block, int row, bool last, const Vector* vectors, int count,
                 int32_t* dots) {
  constexpr int kValues = layout::block_values(kBits), kWords = layout::block_words(kBits);
  constexpr int kRows = kBlocks * kValues;
  const Target target{*gemv.weight, block.group, gemv.column};
  const int64_t N = gemv.weight->N;
  const uint32_t* words = words_of(*gemv.weight, block.row + row, gemv.column);
  for (; row + kRows <= block.rows; row += kRows, words += kBlocks * kWords * N) {
    const uint32_t* next = words + kBlocks * kWords * N;
    if (row + kRows < block.rows) {
      add_vectors<kBits, kDot, kBlocks, false>(words, N, gemv.columns, next, row, vectors, count, dots, target);
    } else {
      add_vectors<kBits, kDot, kBlocks, true>(words, N, gemv.columns, last ? words : next, row, vectors, count, dots,
                                              target);
    }
  }
  if (row == block.rows) return;
  if constexpr (kRows > kSmallBatchRows) {
    add_batches<kBits, kDot, kSmallBatchRows / kValues>(gemv, block, row, last, vectors, count, dots);
  } else if constexpr (kBlocks > 1) {
    add_batches<kBits, kDot, 1>(gemv, block, row, last, vectors, count, dots);
  }
}

template <int kBits, Dot kDot>
void run(const Gemv& gemv) {
  const Blocks blocks(*gemv.weight, kBlockRows);
  // Two limbs for each row at most.
  alignas(64) int32_t dots[2 * kGemvSums];
  std::memset(dots, 0, sizeof(int32_t) * 2 * gemv.rows * round_up(gemv.columns, 16 * nr));
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
    add_batches<kBits, kDot, kBatchRows / layout::block_values(kBits)>(gemv, blocks[b], 0, b + 1 == blocks.count(),
                                                                       vectors, count, dots);
  }
}

template <Dot kDot>
void run_bits(const Gemv& gemv) {
  switch (gemv.weight->bits) {
    case 2: return run<2, kDot>(gemv);
    case 3: return run<3, kDot>(gemv);
    case 4: return run<4, kDot>(gemv);
    default: return run<8, kDot>(gemv);
  }
}

}  // namespace

void avx512::gemv(const Gemv& gemv) { run_bits<Dot::kInt16>(gemv); }
void avx512::gemv_vnni(const Gemv& gemv) {
  if (gemv.int8) return run_bits<Dot::kInt8>(gemv);
  run_bits<Dot::kInt16Vnni>(gemv);
}

}  // namespace exllama::cpu

#endif
