// What the kernels of every device are given of a packed weight: pointers into its device's memory, and sizes.
#pragma once

#include <cstdint>

namespace exllama::layout {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// A packed weight, as torch.ops.exllama.gptq_gemm takes it.
struct Weight {
  const uint32_t* qweight;  // (K * bits / 32, N)
  const uint32_t* qzeros;   // (G, N * bits / 32)
  const void* scales;       // (G, N)
  DType scales_dtype;
  const int32_t* rows;  // shuffled: perm (K,) or null; else the group of each row (K,) or null
  int64_t K;
  int64_t N;
  int64_t G;
  int64_t group_size;  // at least 1; not looked at where rows gives the groups
  int32_t bits;        // 2, 3, 4 or 8
  bool shuffled;
  bool zeros_v2;  // the stored zero point is the zero point itself, not minus one
};

// Of weights side by side.
inline int64_t columns_of(const Weight* parts, int64_t count) {
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) columns += parts[i].N;
  return columns;
}

}  // namespace exllama::layout
