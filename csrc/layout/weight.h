// What the kernels of every device are given of a packed weight: pointers into its device's memory, and sizes.
#pragma once

#include <cstdint>

#include "formats.h"

namespace exllama::layout {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

EXLLAMA_HOST_DEVICE constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A packed weight, as torch.ops.exllama.gptq_gemm takes it.
struct Weight {
  const uint32_t* qweight;  // (K * bits / 32, N)
  const uint32_t* qzeros;   // (G, N * bits / 32)
  const void* scales;       // (G, N)
  DType scales_dtype;
  const int32_t* row_order;  // shuffled: perm (K,) or null; else g_idx (K,) or null
  int64_t K;                 // rows of the words
  int64_t N;
  int64_t G;
  int64_t group_size;  // at least 1; not looked at where there is a g_idx
  int32_t bits;        // one of kWidths
  bool shuffled;
  int32_t zero_offset;  // what is added to a stored zero point: 0 or 1
  int64_t in_features;  // rows of W and columns of x: K, or fewer where rows of the words fill groups up

  // The checkpoint's number of each row of the words, or null where that is its own. A row that only fills its group has
  // -1. It multiplies 0, whatever x is.
  EXLLAMA_HOST_DEVICE const int32_t* perm() const { return shuffled ? row_order : nullptr; }
  // The group of each row, or null where the groups are runs of group_size rows.
  EXLLAMA_HOST_DEVICE const int32_t* g_idx() const { return shuffled ? nullptr : row_order; }
};

// The columns of weights that stand side by side.
inline int64_t columns_of(const Weight* parts, int64_t count) {
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) columns += parts[i].N;
  return columns;
}

}  // namespace exllama::layout
