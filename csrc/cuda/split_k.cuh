// The second step of a gemm whose sums were split along K.
#pragma once

#include "numbers.cuh"

namespace exllama::cuda {

inline constexpr int kSplitThreads = 256;

// out (elements,) = the sum of partials (split_k, elements) over the splits, always from the first to the last.
static __global__ void add_splits(const float* partials, int split_k, int64_t elements, void* out, DType dtype) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = partials[i];
  for (int split = 1; split < split_k; ++split) sum += partials[split * elements + i];
  store_number(sum, out, dtype, i);
}

}  // namespace exllama::cuda
