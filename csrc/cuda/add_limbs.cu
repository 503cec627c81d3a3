#include <cmath>

#include "add_limbs.cuh"
#include "launch.h"

namespace exllama::cuda {

void add_limbs(const Weight& weight, int64_t first_row, int64_t rows_of_w, const float* const* products, int64_t M,
               void* dx, DType dtype, Stream stream) {
  const Limbs limbs = limbs_of(dtype, weight.scales_dtype, weight.bits);
  const int64_t row_blocks = divide_up(rows_of_w, kAddLimbsThreads * kAddLimbsColumns);
  if (M * row_blocks == 0) return;
  LimbProducts of_limbs{};
  for (int i = 0; i < limbs.count; ++i) of_limbs.of_limb[i] = products[i];
  of_limbs.count = limbs.count;
  of_limbs.step = std::ldexp(1.0f, -limbs.step);
  of_limbs.factor = std::ldexp(1.0f, limbs.shift);
  of_limbs.columns = rows_of_w;
  add_limb_products<<<grid_of(M * row_blocks, "add_limbs"), kAddLimbsThreads, 0, to_cuda(stream)>>>(
      weight, of_limbs, first_row, static_cast<uint32_t>(row_blocks), dx, dtype);
  check(cudaGetLastError(), "add_limbs");
}

}  // namespace exllama::cuda
