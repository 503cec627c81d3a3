// The second step of a gemm whose sums were split along K, or whose rows of results do not lie one after the other.
#pragma once

#include "numbers.cuh"

namespace exllama::cuda {

inline constexpr int kSplitThreads = 256;

// out = the sum of the splits of partials (split_k, elements), always from the first to the last; a row has N elements,
// and out_stride numbers lie between the beginnings of two rows of out.
static __global__ void add_splits(const float* partials, int split_k, int64_t elements, int64_t N, void* out,
                                  int64_t out_stride, DType dtype) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = partials[i];
  for (int split = 1; split < split_k; ++split) sum += partials[split * elements + i];
  store_number(sum, out, dtype, i / N * out_stride + i % N);
}

}  // namespace exllama::cuda
