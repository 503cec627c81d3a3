// What stands before and after other kernels: columns of x in the order of the words, and rows of W or columns of dx
// for a result.
#pragma once

#include "tile.cuh"
#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kGatherThreads = 128;
inline constexpr int kGatherColumns = 8;  // of a thread

// The thread blocks along a row of so many columns.
inline int64_t gather_blocks(int64_t columns) {
  return (columns + kGatherThreads * kGatherColumns - 1) / (kGatherThreads * kGatherColumns);
}

// out (rows, columns) = in (rows, limit) with column index[c] in column c. Where `fills`, -1 stands for zeros. A row has
// row_blocks thread blocks. With experts the index is that of the row's expert, which lie so many entries apart, and a row
// of none is 0.
template <typename T, bool fills>
__global__ void gather_columns(const T* in, int64_t limit, const int32_t* index, int64_t columns, uint32_t row_blocks,
                               Experts experts, int64_t expert_entries, T* out) {
  const int64_t row = blockIdx.x / row_blocks;
  int64_t expert = 0;
  if (experts.offsets) {  // whose tiles of one row are the rows
    expert = rows_of_tile(experts, gridDim.x / row_blocks, static_cast<uint32_t>(row), 1).expert;
  }
  const int64_t first = (static_cast<int64_t>(blockIdx.x % row_blocks) * kGatherThreads + threadIdx.x) * kGatherColumns;
  if (first >= columns) return;
  const auto there = static_cast<int>(min(columns - first, static_cast<int64_t>(kGatherColumns)));
  int32_t from[kGatherColumns] = {};
  if (expert >= 0) {
    load_indices<kGatherColumns, fills ? -1 : 0>(index + expert * expert_entries + first, there, limit, from);
  }
  in += row * limit;
  out += row * columns + first;
  __align__(16) T values[kGatherColumns];
#pragma unroll
  for (int i = 0; i < kGatherColumns; ++i) {
    values[i] = expert < 0 || (fills && from[i] == -1) ? T{0} : __ldg(in + from[i]);
  }
  if (there == kGatherColumns && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(values)) / 16; ++i) {
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(values)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGatherColumns; ++i) {
      if (i < there) out[i] = values[i];
    }
  }
}

// out (rows, columns) = in (limit, columns) with row index[r] in row r.
template <typename T>
__global__ void gather_rows(const T* in, int64_t limit, const int32_t* index, int64_t columns, int64_t elements,
                            T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (i < elements) out[i] = in[checked_index(index[i / columns], limit) * columns + i % columns];
}

}  // namespace exllama::cuda
