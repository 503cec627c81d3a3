// The second step of a gemm whose sums were split along K: by the last thread block of a tile, or by the kernel of
// add_splits.cuh.
//
// A kernel that splits K writes its sums to splits.partials, from all its thread blocks (tile, split). Where there are
// tickets it calls add_splits_of_tile then, and its product is done in one launch. Any kernel can: it says which numbers
// of the result the tile has. Both ways add in the same order, from the first split to the last. So they give the same
// bits, whichever thread block is the last.
#pragma once

#include "splits.h"

namespace exllama::cuda {

// The sum of a number's partials, which lie `stride` apart. They are in L2, where other SMs have written them.
static __device__ inline float sum_of_splits(const float* partials, int64_t stride, unsigned split_k) {
  float sum = __ldcg(partials);
#pragma unroll 4
  for (unsigned split = 1; split < split_k; ++split) sum += __ldcg(partials + split * stride);
  return sum;
}

// Whether this thread block is the last one of its tile, and sees what the others have written. All of its threads ask.
// The counter wraps around to 0 with the last one, for the next launch.
static __device__ inline bool is_last_of_splits(uint32_t* tickets) {
  __shared__ bool s_is_last;
  __syncthreads();  // all threads have written
  if (threadIdx.x == 0) {
    __threadfence();  // what this thread has seen written by its thread block is written for all, before the ticket
    s_is_last = atomicInc(tickets + blockIdx.x, gridDim.y - 1) == gridDim.y - 1;
    __threadfence();  // what is read from here on was written before the last ticket
  }
  __syncthreads();
  return s_is_last;
}

// The last thread block of a tile adds up its numbers, and calls store(index in the result, sum) for each. The others and
// itself have written them to splits.partials (gridDim.y, M, columns). The tile has `rows` rows, from first_row
// on, and kTileColumns columns of which tile_columns are there, from first_column of the result on.
template <int kTileColumns, typename Store>
__device__ __forceinline__ void add_splits_of_tile(const Splits& splits, int64_t M, int64_t columns, int64_t first_row,
                                                   int rows, int64_t first_column, int tile_columns,
                                                   const Store& store) {
  if (!is_last_of_splits(splits.tickets)) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kTileColumns; i += blockDim.x) {
    if (i % kTileColumns >= tile_columns) continue;
    const int64_t at = (first_row + i / kTileColumns) * columns + first_column + i % kTileColumns;
    store(at, sum_of_splits(splits.partials + at, M * columns, gridDim.y));
  }
}

}  // namespace exllama::cuda
