// dequantize: a thread has a block of words of one column.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kDequantizeThreads = 256;

// Stores the values of a block of words of one column of out (K, columns). The dtype and the permutation are looked at
// once for all of them.
template <int bits, typename T>
__device__ void store_block(const Weight& weight, const float (&values)[layout::block_values(bits)], int64_t block,
                            int64_t column, int64_t columns, T* out) {
  constexpr int kValues = layout::block_values(bits);
  if (const int32_t* perm = weight.perm()) {
    constexpr int kTogether = kValues < 8 ? kValues : 8;
#pragma unroll
    for (int first = 0; first < kValues; first += kTogether) {
      int32_t rows[kTogether];
      load_indices(perm + block * kValues + first, kTogether, weight.K, rows);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) out[rows[j] * columns + column] = rounded<T>(values[first + j]);
    }
  } else {
    out += block * kValues * columns + column;
#pragma unroll
    for (int j = 0; j < kValues; ++j, out += columns) *out = rounded<T>(values[j]);
  }
}

// out (K, columns) = scale * (q - z) in the columns from first_column on. It is rounded once from float32, in which the
// product is exact for scales of 16 bits. Row k of the words goes to row permuted_row(k).
template <int bits, bool shuffled>
__global__ void dequantize_columns(Weight weight, int64_t first_column, int64_t columns, void* out, DType out_dtype) {
  constexpr int kValues = layout::block_values(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (thread >= weight.K / kValues * columns) return;
  const int64_t block = thread / columns, column = thread % columns;
  float values[kValues];
  visit_block<bits, shuffled>(weight, block, first_column + column, [&](int j, float value) { values[j] = value; });
  switch (out_dtype) {
    case DType::kFloat16:
      return store_block<bits>(weight, values, block, column, columns, static_cast<__half*>(out));
    case DType::kBFloat16:
      return store_block<bits>(weight, values, block, column, columns, static_cast<__nv_bfloat16*>(out));
    case DType::kFloat32:
      return store_block<bits>(weight, values, block, column, columns, static_cast<float*>(out));
  }
}

}  // namespace exllama::cuda
