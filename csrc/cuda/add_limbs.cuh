// The products with the limbs of W become columns of dx.
#pragma once

#include "limbs.h"
#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kAddLimbsThreads = 128;
inline constexpr int kAddLimbsColumns = 4;  // of a thread

// float32 (rows, columns): with each limb of the rows of W from first_row on, as many as there are columns.
struct LimbProducts {
  const float* of_limb[kMaxLimbs];
  int count;
  float step;    // 2**-step
  float factor;  // 2**shift
  int64_t columns;
};

// Stores four neighbours, 8 bytes at once if they are aligned.
__device__ __forceinline__ void store_four(const float (&values)[4], void* array, DType dtype, int64_t at) {
  uint16_t* const to = static_cast<uint16_t*>(array) + at;
  __align__(8) uint16_t numbers[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) store_number(values[i], numbers, dtype, i);
  if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(numbers);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = numbers[i];
  }
}

// Writes these columns of dx (rows, K), of 16 bits, which has row_blocks thread blocks for a row. Row k of the words is column
// permuted_row(k). Only the first limb of a weight is 0 where the weight is. So where its product is not finite, the
// others add nothing to it but zeros times inf.
static __global__ void add_limb_products(Weight weight, LimbProducts products, int64_t first_row, uint32_t row_blocks,
                                         void* dx, DType dtype) {
  const int64_t row = blockIdx.x / row_blocks;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x % row_blocks) * kAddLimbsThreads + threadIdx.x) * kAddLimbsColumns;
  if (first >= products.columns) return;
  float4 sums = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int limb = kMaxLimbs - 1; limb >= 0; --limb) {
    if (limb >= products.count) continue;
    const float* from = products.of_limb[limb] + row * products.columns + first;
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    const auto add = [&](float sum, float product) {
      return limb == 0 && !isfinite(product) ? product : fmaf(sum, products.step, product);
    };
    sums = make_float4(add(sums.x, four.x), add(sums.y, four.y), add(sums.z, four.z), add(sums.w, four.w));
  }
  const float values[kAddLimbsColumns] = {sums.x * products.factor, sums.y * products.factor, sums.z * products.factor,
                                          sums.w * products.factor};
  const int64_t to = row * weight.K + first_row + first;
  if (!weight.perm()) return store_four(values, dx, dtype, to);
  int64_t columns[kAddLimbsColumns];
  columns_of_x<false>(weight.perm(), weight.K, [&](int i) { return first_row + first + i; }, columns);
#pragma unroll
  for (int i = 0; i < kAddLimbsColumns; ++i) store_number(values[i], dx, dtype, row * weight.K + columns[i]);
}

}  // namespace exllama::cuda
