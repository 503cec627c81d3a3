// dequantize: one thread a block of words of one column.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kDequantizeThreads = 256;

// out (K, columns) = scale * (q - z) of the columns from first_column on, rounded once from float32, where the product
// is exact for scales of 16 bits. Row k of the words goes to row source_row(k).
template <int bits, bool shuffled, typename Out>
__global__ void dequantize_columns(Weight weight, int64_t first_column, int64_t columns, Out* out) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (thread >= weight.K / kValues * columns) return;
  const int64_t block = thread / columns, column = thread % columns, n = first_column + column;
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = weight.qweight[(block * kWords + w) * weight.N + n];
  int64_t loaded = -1;
  float scale = 0;
  int zero = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int64_t k = block * kValues + j, group = group_of(weight, k);
    if (group != loaded) {
      scale = scale_of(weight, group, n);
      zero = static_cast<int>(zero_of<bits>(weight, group, n));
      loaded = group;
    }
    const int q = static_cast<int>(value_of<bits, shuffled>(words, j));
    out[source_row(weight, k) * columns + column] = rounded<Out>(static_cast<float>(q - zero) * scale);
  }
}

}  // namespace exllama::cuda
