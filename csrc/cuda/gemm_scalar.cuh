// gemm on the CUDA cores: any arch, order of words, group size and dtype, float32 arithmetic throughout.
//
// A warp has 128 columns, four to a lane, and the four warps of a thread block share the rows of a stage. Each word is
// read once for all `rows` rows of x. q - z is exact in float32, so that an outlier of x costs nothing where q = z.
#pragma once

#include "parts.h"
#include "tiles.h"
#include "words.cuh"

namespace exllama::cuda {

__device__ inline uint4 load_four_columns(const uint32_t* words, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint4*>(words));
  return make_uint4(__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3));
}

// x (M, K) rows `first_row` and on, columns of W's rows `first_k` and on, as floats [kScalarStageK][rows].
template <int rows>
__device__ void stage_x(const Weight& weight, const void* x, DType dtype, int64_t M, int64_t first_row,
                        int64_t first_k, float* s_x) {
  for (int i = threadIdx.x; i < kScalarStageK; i += kScalarThreads) {
    const int64_t k = first_k + i;
    const int64_t source = k < weight.K ? source_row(weight, k) : 0;
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      const bool inside = k < weight.K && first_row + m < M;
      s_x[i * rows + m] = inside ? load_number(x, dtype, (first_row + m) * weight.K + source) : 0.0f;
    }
  }
}

// The sums of one lane: `rows` rows by four columns.
template <int bits, int rows>
struct ScalarSums {
  float total[rows][4] = {};
  float group_sum[rows][4] = {};  // of x * (q - z) in the present group
  float scale[4] = {};
  float zero[4] = {};  // 2**23 + z
  int64_t group = -1;

  __device__ void end_group() {
#pragma unroll
    for (int m = 0; m < rows; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        total[m][c] = fmaf(group_sum[m][c], scale[c], total[m][c]);
        group_sum[m][c] = 0;
      }
    }
  }

  __device__ void enter_group(const Weight& weight, int64_t next, int64_t column) {
    if (next == group) return;
    end_group();
    group = next;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      scale[c] = scale_of(weight, group, column + c);
      zero[c] = 8388608.0f + static_cast<float>(zero_of<bits>(weight, group, column + c));
    }
  }

  // Value j of the four columns' words, times x of that row of W.
  template <bool shuffled>
  __device__ void add(const uint32_t (&words)[4][layout::block_words(bits)], int j, const float* x) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // With the exponent of 2**23, the bits of q are the float 2**23 + q.
      const float q = __uint_as_float(value_of<bits, shuffled>(words[c], j) | 0x4B000000u) - zero[c];
#pragma unroll
      for (int m = 0; m < rows; ++m) group_sum[m][c] = fmaf(x[m], q, group_sum[m][c]);
    }
  }
};

// The words of `blocks` blocks of four columns from row k of W on; zeros beyond K.
template <int bits, int blocks>
__device__ void load_blocks(const Weight& weight, int64_t k, int64_t column, bool aligned,
                            uint32_t (&words)[blocks][4][layout::block_words(bits)]) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
#pragma unroll
  for (int i = 0; i < blocks; ++i) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint4 four = make_uint4(0, 0, 0, 0);
      if (k + i * kValues < weight.K) {
        four = load_four_columns(weight.qweight + (k / kValues * kWords + i * kWords + w) * weight.N + column, aligned);
      }
      words[i][0][w] = four.x;
      words[i][1][w] = four.y;
      words[i][2][w] = four.z;
      words[i][3][w] = four.w;
    }
  }
}

// partials (split_k, M, columns) if there are several splits, else out (M, columns). A split has stages_per_split stages
// of K.
// Thread blocks of an SM are named because ptxas otherwise aims at 80 registers for one row, and spills for it.
template <int bits, bool shuffled, int rows>
__global__ void __launch_bounds__(kScalarThreads, rows == 1 ? 5 : 3)
    gemm_scalar(Parts parts, const void* x, DType dtype, int64_t M, int64_t stages_per_split, float* partials,
                void* out) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  constexpr int kWarpK = kScalarStageK / kScalarWarps;  // rows of W that a warp has of a stage
  constexpr int kBatch = kWords < 4 ? 4 / kWords : 1;   // blocks that are loaded together
  constexpr int kXFloats = kScalarStageK * rows, kSumFloats = kScalarWarps * rows * kScalarColumns;
  __shared__ __align__(16) float s_floats[kXFloats > kSumFloats ? kXFloats : kSumFloats];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tile tile(parts, blockIdx.x % parts.column_tiles, kScalarColumns);
  const Weight& weight = tile.weight;
  const int64_t first_column = tile.first_column;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / parts.column_tiles) * rows;
  const int64_t column = first_column + 4 * lane;
  const bool active = column < weight.N;  // N is a multiple of 4
  const bool aligned = reinterpret_cast<uintptr_t>(weight.qweight) % 16 == 0;
  const bool raw = !weight.shuffled && weight.rows;

  ScalarSums<bits, rows> sums;
  int64_t end_of_group = 0;
  const int64_t first_stage = blockIdx.y * stages_per_split;
  for (int64_t stage = first_stage; stage < first_stage + stages_per_split; ++stage) {
    const int64_t stage_k = stage * kScalarStageK;
    if (stage_k >= weight.K) break;
    __syncthreads();  // the last stage has been read
    stage_x<rows>(weight, x, dtype, M, first_row, stage_k, s_floats);
    __syncthreads();
    const int64_t first_k = stage_k + warp * kWarpK;
    const auto end = static_cast<int>(min(weight.K - first_k, static_cast<int64_t>(kWarpK)));
    const float* const s_x = s_floats + warp * kWarpK * rows;
    if (!active) continue;
    if (raw || weight.group_size % kValues != 0) {
      // The group may change with every row.
      for (int i = 0; i < end; i += kValues) {
        uint32_t words[1][4][kWords];
        load_blocks<bits>(weight, first_k + i, column, aligned, words);
#pragma unroll 1
        for (int j = 0; j < kValues; ++j) {
          sums.enter_group(weight, group_of(weight, first_k + i + j), column);
          float r_x[rows];
#pragma unroll
          for (int m = 0; m < rows; ++m) r_x[m] = s_x[(i + j) * rows + m];
          sums.template add<shuffled>(words[0], j, r_x);
        }
      }
      continue;
    }
    for (int batch = 0; batch < end; batch += kBatch * kValues) {
      uint32_t words[kBatch][4][kWords];
      load_blocks<bits>(weight, first_k + batch, column, aligned, words);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int first = batch + i * kValues;
        if (first >= end) break;
        if (first_k + first >= end_of_group) {  // a division of 64 bits for every group and not for every block
          const int64_t group = (first_k + first) / weight.group_size;
          end_of_group = (group + 1) * weight.group_size;
          sums.enter_group(weight, group, column);
        }
        // As many rows of W at a time as fill float4 loads of x.
        constexpr int kTogether = rows < 4 ? 4 / rows : 1, kLoads = kTogether * rows / 4;
#pragma unroll
        for (int j = 0; j < kValues; j += kTogether) {
          float r_x[kTogether * rows];
#pragma unroll
          for (int v = 0; v < kLoads; ++v) {
            const float4 four = *reinterpret_cast<const float4*>(s_x + (first + j) * rows + 4 * v);
            r_x[4 * v] = four.x;
            r_x[4 * v + 1] = four.y;
            r_x[4 * v + 2] = four.z;
            r_x[4 * v + 3] = four.w;
          }
#pragma unroll
          for (int together = 0; together < kTogether; ++together) {
            sums.template add<shuffled>(words[i], j + together, r_x + together * rows);
          }
        }
      }
    }
  }
  sums.end_group();

  __syncthreads();  // the last stage has been read
#pragma unroll
  for (int m = 0; m < rows; ++m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s_floats[(warp * rows + m) * kScalarColumns + 4 * lane + c] = sums.total[m][c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kScalarColumns; i += kScalarThreads) {
    const int64_t m = first_row + i / kScalarColumns, n = first_column + i % kScalarColumns;
    if (m >= M || n >= weight.N) continue;
    float sum = s_floats[i];
#pragma unroll
    for (int other = 1; other < kScalarWarps; ++other) sum += s_floats[other * rows * kScalarColumns + i];
    const int64_t to = tile.columns_before + n;
    if (partials) {
      partials[(blockIdx.y * M + m) * parts.columns + to] = sum;
    } else {
      store_number(sum, out, dtype, m * parts.columns + to);
    }
  }
}

}  // namespace exllama::cuda
