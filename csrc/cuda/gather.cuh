// What stands before and after the kernels of a filled weight: columns of x for its rows, and rows of W for a result.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kGatherThreads = 256;

// out (rows, columns) = in (rows, limit) with column index[c] in column c. Where `fills`, -1 stands for zeros.
template <typename T, bool fills>
__global__ void gather_columns(const T* in, int64_t limit, const int32_t* index, int64_t columns, int64_t elements,
                               T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (i >= elements) return;
  const int32_t from = index[i % columns];
  out[i] = fills && from == -1 ? T{0} : in[i / columns * limit + checked_index(from, limit)];
}

// out (rows, columns) = in (limit, columns) with row index[r] in row r.
template <typename T>
__global__ void gather_rows(const T* in, int64_t limit, const int32_t* index, int64_t columns, int64_t elements,
                            T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (i < elements) out[i] = in[checked_index(index[i / columns], limit) * columns + i % columns];
}

}  // namespace exllama::cuda
