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

// How far ahead of its use a word is prefetched: 2 KiB of its row.
constexpr int kAheadColumns = 512;
// Vectors of x that share an unpacked word, and strips that share a broadcast pair of x: of 32 registers the sums take
// 16, the pairs of 4-bit words 8.
constexpr int kMaxVectors = 8, nr = 2;
// Pairs of rows in a batch: four rows of 4-bit words, or 2 of 2, 3 of 3 and 8 of 8 bits.
constexpr int kBatchPairs = 16;

// One limb of one row of x in one block.
struct Vector {
  const int16_t* x;
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
// the next batch begins, `pairs` has x as [pair][vector].
template <int kBits, bool kVnni, int mr, int kBlocks, bool kLast>
EXLLAMA_AVX512 void add_batch(const uint32_t* words, int64_t N, int columns, const uint32_t* next, const int32_t* pairs,
                              int32_t* dots, const Vector* vectors, const Target& target) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const int64_t stride = round_up(columns, 16 * nr);
  for (int n = 0; n < columns; n += 16 * nr) {
    const uint32_t* ahead =
        n + kAheadColumns < columns ? words + n + kAheadColumns : next + (n + kAheadColumns - columns);
    __mmask16 mask[nr];
    __m512i dot[mr][nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 24
      for (int w = 0; w < kBlocks * kWords; ++w) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + w * N + 16 * v), _MM_HINT_T0);
      }
      mask[v] = mask_of(columns - n - 16 * v);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) dot[m][v] = _mm512_loadu_si512(dots + m * stride + n + 16 * v);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlocks; ++i) {
      __m512i loaded[kWords], pair[nr][kPairs];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 3
        for (int w = 0; w < kWords; ++w) {
          loaded[w] = _mm512_maskz_loadu_epi32(mask[v], words + (i * kWords + w) * N + n + 16 * v);
        }
        split_pairs<kBits>(loaded, pair[v]);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) {
          const __m512i x = broadcast(pairs + (i * kPairs + p) * mr + m);
#pragma GCC unroll 2
          for (int v = 0; v < nr; ++v) dot_int16<kVnni>(dot[m][v], pair[v][p], x);
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

template <int kBits, bool kVnni, int kBlocks, bool kLast>
void add_vectors(const uint32_t* words, int64_t N, int columns, const uint32_t* next, int row, const Vector* vectors,
                 int count, int32_t* dots, const Target& target) {
  constexpr int kPairs = kBlocks * layout::block_values(kBits) / 2;
  static constexpr Batch kBatches[kMaxVectors] = {
      add_batch<kBits, kVnni, 1, kBlocks, kLast>, add_batch<kBits, kVnni, 2, kBlocks, kLast>,
      add_batch<kBits, kVnni, 3, kBlocks, kLast>, add_batch<kBits, kVnni, 4, kBlocks, kLast>,
      add_batch<kBits, kVnni, 5, kBlocks, kLast>, add_batch<kBits, kVnni, 6, kBlocks, kLast>,
      add_batch<kBits, kVnni, 7, kBlocks, kLast>, add_batch<kBits, kVnni, 8, kBlocks, kLast>,
  };
  // Even passes: the words of all but the first come from L1.
  const int passes = (count + kMaxVectors - 1) / kMaxVectors;
  for (int pass = 0; pass < passes; ++pass) {
    const int begin = count * pass / passes, mr = count * (pass + 1) / passes - begin;
    int32_t pairs[kPairs * kMaxVectors];
    for (int m = 0; m < mr; ++m) {
      for (int p = 0; p < kPairs; ++p) {
        std::memcpy(&pairs[p * mr + m], vectors[begin + m].x + row + 2 * p, sizeof(int32_t));
      }
    }
    kBatches[mr - 1](words, N, columns, next, pairs, dots + begin * round_up(columns, 16 * nr), vectors + begin, target);
  }
}

template <int kBits, bool kVnni>
void add_block(const Gemv& gemv, const Block& block, bool last, const Vector* vectors, int count, int32_t* dots) {
  constexpr int kValues = layout::block_values(kBits), kWords = layout::block_words(kBits);
  constexpr int kBlocks = 2 * kBatchPairs / kValues;
  const Weight& weight = *gemv.weight;
  const Target target{weight, block.group, gemv.column};
  const int64_t N = weight.N;
  const uint32_t* words = words_of(weight, block.row, gemv.column);
  int row = 0;
  for (; row + kBlocks * kValues < block.rows; row += kBlocks * kValues) {
    const uint32_t* next = words + kBlocks * kWords * N;
    add_vectors<kBits, kVnni, kBlocks, false>(words, N, gemv.columns, next, row, vectors, count, dots, target);
    words = next;
  }
  if (row + kBlocks * kValues == block.rows) {
    const uint32_t* next = last ? words : words + kBlocks * kWords * N;
    add_vectors<kBits, kVnni, kBlocks, true>(words, N, gemv.columns, next, row, vectors, count, dots, target);
    return;
  }
  for (; row + kValues < block.rows; row += kValues) {
    const uint32_t* next = words + kWords * N;
    add_vectors<kBits, kVnni, 1, false>(words, N, gemv.columns, next, row, vectors, count, dots, target);
    words = next;
  }
  const uint32_t* next = last ? words : words + kWords * N;
  add_vectors<kBits, kVnni, 1, true>(words, N, gemv.columns, next, row, vectors, count, dots, target);
}

template <int kBits, bool kVnni>
void run(const Gemv& gemv) {
  const Blocks blocks(*gemv.weight, kBlockRows);
  // Two limbs for each row at most.
  alignas(64) int32_t dots[2 * kGemvSums] = {};
  Vector vectors[2 * kGemvRows];
  for (int64_t b = 0; b < blocks.count(); ++b) {
    int count = 0;
    for (int m = 0; m < gemv.rows; ++m) {
      const int64_t entry = b * gemv.rows + m;
      const BlockScale& scale = gemv.x_scales[entry];
      float* acc = gemv.acc + m * gemv.columns;
      vectors[count++] = {gemv.x + entry * gemv.x_stride, scale.sum[0], scale.scale[0], acc};
      if (scale.limbs == Limbs::kTwo) {
        vectors[count++] = {gemv.x_second + entry * gemv.x_stride, scale.sum[1], scale.scale[1], acc};
      }
    }
    add_block<kBits, kVnni>(gemv, blocks[b], b + 1 == blocks.count(), vectors, count, dots);
  }
}

template <bool kVnni>
void run_bits(const Gemv& gemv) {
  switch (gemv.weight->bits) {
    case 2: return run<2, kVnni>(gemv);
    case 3: return run<3, kVnni>(gemv);
    case 4: return run<4, kVnni>(gemv);
    default: return run<8, kVnni>(gemv);
  }
}

}  // namespace

void avx512::gemv(const Gemv& gemv) { run_bits<false>(gemv); }
void avx512::gemv_vnni(const Gemv& gemv) { run_bits<true>(gemv); }

}  // namespace exllama::cpu

#endif
