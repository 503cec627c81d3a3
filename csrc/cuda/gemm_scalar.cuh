// gemm on the CUDA cores: it takes any arch, order of words, group size and dtype. All arithmetic is in float32.
//
//   K, the rows of W      split -> stage (256 rows) -> the 64 rows of a warp -> block of words
//   N, the columns of W   thread block (128), as all its warps -> the 4 columns of a lane
//   M, the rows of x      tile of 1, 2, 4 or 8 rows
//
// Each word is read once for all rows of a tile. q - z is exact in float32: an outlier of x costs nothing where q = z.
#pragma once

#include "gemm_scalar.h"
#include "overlap.cuh"
#include "split_k.cuh"
#include "tile.cuh"
#include "words.cuh"

namespace exllama::cuda {

// Lays the x of a stage into shared memory, as floats [row of W][row of x], for so many rows of x from first_row on. Each
// warp has kScalarWarpK rows of W in a stage, from stage_k + warp * warp_rows on.
template <int rows>
__device__ void load_x(const Weight& weight, const void* x, DType dtype, int64_t first_row, int rows_of_x,
                       int64_t stage_k, int64_t warp_rows, float* s_x) {
  // Look-ups of columns that go together. For eight rows registers would be spilled.
  constexpr int kEach = kScalarStageK / kScalarThreads, kTogether = rows < 8 ? kEach : 1;
#pragma unroll 1
  for (int first = threadIdx.x; first < kScalarStageK; first += kTogether * kScalarThreads) {
    const auto row_of_w = [&](int e) {
      const int i = first + e * kScalarThreads;
      return stage_k + i / kScalarWarpK * warp_rows + i % kScalarWarpK;
    };
    int64_t x_columns[kTogether];
    columns_of_x<false>(weight.perm(), weight.K, row_of_w, x_columns);
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      float values[rows] = {};
      if (x_columns[e] >= 0) {
        int64_t at = first_row * weight.K + x_columns[e];
#pragma unroll
        for (int m = 0; m < rows; ++m, at += weight.K) {
          if (m < rows_of_x) values[m] = load_number(x, dtype, at);
        }
      }
#pragma unroll
      for (int m = 0; m < rows; ++m) s_x[(first + e * kScalarThreads) * rows + m] = values[m];
    }
  }
}

// The sums of a lane, in four columns of `rows` rows of the result.
template <int bits, bool shuffled, int rows>
struct ScalarSums {
  static constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);

  float total[rows][4] = {};
  float group_sum[rows][4] = {};  // x * (q - z) in the present group
  float scale[4] = {};
  PlacedFields<bits, shuffled> fields[4] = {};

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

  __device__ void begin_group(const Weight& weight, int64_t group, int64_t column) {
    const float4 four = load_four(weight.scales, weight.scales_dtype, group * weight.N + column);
    scale[0] = four.x;
    scale[1] = four.y;
    scale[2] = four.z;
    scale[3] = four.w;
    const FourZeros<bits> zeros(weight, group, column);
#pragma unroll
    for (int c = 0; c < 4; ++c) fields[c].set_zero(zeros.get(weight, c));
  }

  // Adds the products of the next `blocks` blocks of words, which lie in the present group. s_x is theirs, as load_x
  // laid it down.
  template <int blocks>
  __device__ void add_blocks(const uint32_t*& qweight, int64_t N, const float*& s_x) {
    uint32_t words[blocks][4][kWords];
#pragma unroll
    for (int i = 0; i < blocks * kWords; ++i) {
      const uint4 four = load_global(reinterpret_cast<const uint4*>(qweight));
      words[i / kWords][0][i % kWords] = four.x;
      words[i / kWords][1][i % kWords] = four.y;
      words[i / kWords][2][i % kWords] = four.z;
      words[i / kWords][3][i % kWords] = four.w;
      qweight += N;
    }
    // Rows of W that are multiplied together: as many as fill float4 loads of x.
    constexpr int kTogether = rows < 4 ? 4 / rows : 1, kLoads = kTogether * rows / 4;
#pragma unroll
    for (int first = 0; first < blocks * kValues; first += kTogether) {
      float r_x[kTogether * rows];
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        const float4 four = *reinterpret_cast<const float4*>(s_x + first * rows + 4 * v);
        r_x[4 * v] = four.x;
        r_x[4 * v + 1] = four.y;
        r_x[4 * v + 2] = four.z;
        r_x[4 * v + 3] = four.w;
      }
#pragma unroll
      for (int k = first; k < first + kTogether; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float q = fields[c].get(words[k / kValues][c], k % kValues);
#pragma unroll
          for (int m = 0; m < rows; ++m) group_sum[m][c] = fmaf(r_x[(k - first) * rows + m], q, group_sum[m][c]);
        }
      }
    }
    s_x += blocks * kValues * rows;
  }

  // Adds the products of a block of words, whose first row is k. Any row of it may begin a group.
  __device__ void add_by_row(const Weight& weight, int64_t k, int64_t column, const float* s_x) {
    uint32_t words[4][kWords], zero_point[4] = {};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        words[c][w] = load_global(weight.qweight + (k / kValues * kWords + w) * weight.N + column + c);
      }
    }
    int64_t group = -1;
#pragma unroll 1
    for (int j = 0; j < kValues; ++j) {
      const int64_t last = group;
      group = group_of(weight, k + j);
      if (group != last) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scale[c] = scale_of(weight, group, column + c);
          zero_point[c] = zero_of<bits>(weight, group, column + c);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const auto q = static_cast<int>(value_of<bits, shuffled>(words[c], j) - zero_point[c]);
        const float w = static_cast<float>(q) * scale[c];
#pragma unroll
        for (int m = 0; m < rows; ++m) total[m][c] = fmaf(s_x[j * rows + m], w, total[m][c]);
      }
    }
  }

  // Leaves the sums in shared memory [warp][row][column].
  __device__ void leave(float* s_sums, int warp, int lane) const {
#pragma unroll
    for (int m = 0; m < rows; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s_sums[(warp * rows + m) * kScalarColumns + 4 * lane + c] = total[m][c];
    }
  }

  // Sum i of [row][column], added over the warps from the first to the last.
  static __device__ float of_all_warps(const float* s_sums, int i) {
    float sum = s_sums[i];
#pragma unroll
    for (int other = 1; other < kScalarWarps; ++other) sum += s_sums[other * rows * kScalarColumns + i];
    return sum;
  }
};

// The launch bounds name the thread blocks of an SM, because ptxas otherwise aims at 80 registers for one row, and
// spills. With 3 bits and eight rows three thread blocks spill before sm_75.
template <int bits, int rows>
__host__ __device__ constexpr int scalar_launch_bound() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
  if (bits == 3 && rows == 8) return 2;
#endif
  return scalar_thread_blocks_per_sm(rows);
}

// The product of one tile and one split, which has stages_per_split stages. It goes to out (M, columns),
// by way of splits if there are several.
template <int bits, bool shuffled, int rows>
__global__ void __launch_bounds__(kScalarThreads, (scalar_launch_bound<bits, rows>()))
    gemm_scalar(Parts parts, const void* x, DType dtype, int64_t M, int64_t stages_per_split, Splits splits,
                void* out) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  constexpr int kBatch = kWords < 4 ? 4 / kWords : 1;  // blocks of words that are loaded together
  constexpr int kXFloats = kScalarStageK * rows, kSumFloats = kScalarWarps * rows * kScalarColumns;
  __shared__ __align__(16) float s_floats[kXFloats > kSumFloats ? kXFloats : kSumFloats];

  wait_for_kernels_before();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tile tile(parts, kScalarColumns, rows, M);
  if (tile.is_empty()) return;
  const Weight& weight = tile.weight;
  const int64_t first_column = tile.first_column, first_row = tile.first_row;
  const auto rows_of_x = static_cast<int>(min(tile.end_row - first_row, static_cast<int64_t>(rows)));
  const int64_t column = first_column + 4 * lane;
  const bool active = column < weight.N;  // N is a multiple of 4
  const size_t four_scales = weight.scales_dtype == DType::kFloat32 ? 16 : 8;
  const bool aligned = reinterpret_cast<uintptr_t>(weight.qweight) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(weight.scales) % four_scales == 0;
  const bool by_row = weight.g_idx() || weight.group_size % kValues != 0 || !aligned;

  // The rows of W that a warp takes follow one another through the stages.
  const int64_t warp_rows = stages_per_split * kScalarWarpK;
  int64_t stage_k = blockIdx.y * stages_per_split * kScalarStageK;  // where the first warp is
  const int64_t end_stage_k = tile.has_weight ? min(stage_k + warp_rows, weight.K) : stage_k;
  int64_t k = stage_k + warp * warp_rows;
  const uint32_t* qweight = weight.qweight + k / kValues * kWords * weight.N + column;
  int64_t group = k / weight.group_size;
  int64_t left_in_group = weight.group_size - (k - group * weight.group_size);

  ScalarSums<bits, shuffled, rows> sums;
  bool begins = true;
  for (; stage_k < end_stage_k; stage_k += kScalarWarpK) {
    __syncthreads();  // the last stage has been read
    load_x<rows>(weight, x, dtype, first_row, rows_of_x, stage_k, warp_rows, s_floats);
    __syncthreads();
    auto left = static_cast<int>(min(weight.K - k, static_cast<int64_t>(kScalarWarpK)));
    const float* s_x = s_floats + warp * kScalarWarpK * rows;
    if (!active || left <= 0) continue;
    if (by_row) {
      for (; left > 0; left -= kValues, k += kValues, s_x += kValues * rows) sums.add_by_row(weight, k, column, s_x);
      continue;
    }
    k += left;
    while (left > 0) {
      if (begins) sums.begin_group(weight, group, column);
      auto together = static_cast<int>(min(left_in_group, static_cast<int64_t>(left)));
      left -= together;
      left_in_group -= together;
      for (; together >= kBatch * kValues; together -= kBatch * kValues) {
        sums.template add_blocks<kBatch>(qweight, weight.N, s_x);
      }
      if constexpr (kBatch > 1) {
        for (; together > 0; together -= kValues) sums.template add_blocks<1>(qweight, weight.N, s_x);
      }
      begins = left_in_group == 0;
      if (begins) {
        sums.end_group();
        ++group;
        left_in_group = weight.group_size;
      }
    }
  }
  if (!begins) sums.end_group();

  __syncthreads();  // the last stage has been read
  sums.leave(s_floats, warp, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kScalarColumns; i += kScalarThreads) {
    const int64_t m = first_row + i / kScalarColumns, n = first_column + i % kScalarColumns;
    if (i / kScalarColumns >= rows_of_x || n >= weight.N) continue;
    const float sum = sums.of_all_warps(s_floats, i);
    const int64_t to = tile.columns_before + n;
    if (splits.partials) {
      splits.partials[(blockIdx.y * M + m) * parts.columns + to] = sum;
    } else {
      store_number(sum, out, dtype, m * parts.columns + to);
    }
  }
  if (!splits.tickets) return;
  const auto columns = static_cast<int>(min(weight.N - first_column, static_cast<int64_t>(kScalarColumns)));
  add_splits_of_tile<kScalarColumns>(splits, M, parts.columns, first_row, rows_of_x, tile.columns_before + first_column,
                                     columns, [&](int64_t at, float sum) { store_number(sum, out, dtype, at); });
}

}  // namespace exllama::cuda
