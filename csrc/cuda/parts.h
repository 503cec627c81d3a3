// Weights that one x is multiplied with in one launch, side by side. One weight is one part.
#pragma once

#include "../layout/weight.h"
#include "experts.h"

namespace exllama::cuda {

using layout::DType;
using layout::Weight;

// The parts of a launch. They are arguments of the kernel, which may have 4 KiB.
inline constexpr int kMaxParts = 8;

// What one weight has for itself.
struct Part {
  const uint32_t* qweight;
  const uint32_t* qzeros;
  const void* scales;
  DType scales_dtype;
  uint32_t end_tile;  // one after its last tile of columns, counted from the first tile of the launch
  int64_t N;
  int64_t columns_before;  // columns of out that belong to the parts before it
};

struct Parts {
  Weight weight;  // the first part: all have its K, groups, row_order and format
  uint32_t column_tiles;
  int64_t columns;  // of out, which may have more parts than these
  Experts experts;  // of which the one part is the first, if there are any
  Part part[kMaxParts];
};

}  // namespace exllama::cuda
