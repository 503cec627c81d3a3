// A product with W or W^T by tiles in shared memory, in float32 arithmetic throughout. gemm_dx uses it, and so does
// gemm for many rows where there are no tensor cores for them.
#pragma once

#include "gemm_tiled.h"
#include "tile.cuh"
#include "words.cuh"

namespace exllama::cuda {

// out (M, columns) = a (M, terms) @ W, where the columns are those of all parts, and the terms are K. If transposed, it
// is a @ W^T of the one part, where the columns are K and the terms are N. Row k of the words is column k of a, or column
// permuted_row(k) of out if transposed.
//
// The launch bounds name the thread blocks of an SM, because ptxas otherwise aims at 64 registers, and spills. With 8
// bits three thread blocks spill before sm_70.
template <int bits, bool shuffled, bool transposed>
__global__ void __launch_bounds__(kTiledThreads, bits == 8 && !transposed ? 2 : 3)
    gemm_tiled(Parts parts, const void* a, DType dtype, int64_t M, void* out) {
  constexpr int kValues = layout::block_values(bits);
  constexpr int kPitch = kTiledColumns + 4;  // a multiple of 16 bytes, and not of the 32 banks
  __shared__ __align__(16) float s_a[kTiledTerms][kPitch];
  __shared__ __align__(16) float s_w[kTiledTerms][kPitch];
  const Tile tile(parts, kTiledColumns, kTiledRows, M);
  if (tile.is_empty()) return;
  const Weight& weight = tile.weight;
  const int64_t K = weight.K, N = weight.N;
  const int64_t columns = transposed ? K : N, terms = transposed ? N : K, end_term = tile.has_weight ? terms : 0;
  const int64_t first_column = tile.first_column, first_row = tile.first_row;
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;

  float sums[4][4] = {};
  for (int64_t first_term = 0; first_term < end_term; first_term += kTiledTerms) {
    __syncthreads();  // the last tiles have been read
    // A thread has 8 loads. More than two at once need too many registers on sm_120, and all of them before sm_75.
#pragma unroll 2
    for (int i = threadIdx.x; i < kTiledRows * kTiledTerms; i += kTiledThreads) {
      const int row = i / kTiledTerms, term = i % kTiledTerms;
      const int64_t m = first_row + row, at = first_term + term;
      const bool inside = m < tile.end_row && at < terms;
      s_a[term][row] = inside ? load_number(a, dtype, m * terms + at) : 0.0f;
    }
    constexpr int kTileN = transposed ? kTiledTerms : kTiledColumns;
    constexpr int kTileK = transposed ? kTiledColumns : kTiledTerms;
    const int64_t first_n = transposed ? first_term : first_column, first_k = transposed ? first_column : first_term;
    for (int i = threadIdx.x; i < kTileK / kValues * kTileN; i += kTiledThreads) {
      const int n = i % kTileN, k = i / kTileN * kValues;
      const auto store = [&](int j, float value) { (transposed ? s_w[n][k + j] : s_w[k + j][n]) = value; };
      if (first_n + n < N && first_k + k < K) {
        visit_block<bits, shuffled>(weight, (first_k + k) / kValues, first_n + n, store);
      } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) store(j, 0.0f);
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int term = 0; term < kTiledTerms; ++term) {
      const float4 a4 = *reinterpret_cast<const float4*>(&s_a[term][4 * down]);
      const float4 w4 = *reinterpret_cast<const float4*>(&s_w[term][4 * across]);
      const float r_a[4] = {a4.x, a4.y, a4.z, a4.w}, r_w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(r_a[i], r_w[j], sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = first_column + 4 * across + j;
    if (column >= columns) continue;
    const int64_t to = tile.columns_before + (transposed ? permuted_row(weight, column) : column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = first_row + 4 * down + i;
      if (m < tile.end_row) store_number(sums[i][j], out, dtype, m * parts.columns + to);
    }
  }
}

}  // namespace exllama::cuda
