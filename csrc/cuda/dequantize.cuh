// dequantize: one thread a block of words of one column.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kDequantizeThreads = 256;

// out (K, columns) = scale * (q - z) of the columns from first_column on, rounded once from float32, where the product
// is exact for scales of 16 bits. Row k of the words goes to row source_row(k).
template <int bits, bool shuffled>
__global__ void dequantize_columns(Weight weight, int64_t first_column, int64_t columns, void* out, DType out_dtype) {
  constexpr int kValues = layout::block_values(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (thread >= weight.K / kValues * columns) return;
  const int64_t block = thread / columns, column = thread % columns;
  visit_block<bits, shuffled>(weight, block, first_column + column, [&](int j, float value) {
    store_number(value, out, out_dtype, source_row(weight, block * kValues + j) * columns + column);
  });
}

}  // namespace exllama::cuda
