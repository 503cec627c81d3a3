// The second step of a gemm whose sums were split along K, where there are more tiles than tickets.
#pragma once

#include "numbers.cuh"
#include "split_k.cuh"

namespace exllama::cuda {

inline constexpr int kSplitThreads = 256;

// out (elements,) = the sum of partials (split_k, elements) over the splits.
__global__ void add_splits(const float* partials, int split_k, int64_t elements, void* out, DType dtype) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i < elements) store_number(sum_of_splits(partials + i, elements, split_k), out, dtype, i);
}

}  // namespace exllama::cuda
