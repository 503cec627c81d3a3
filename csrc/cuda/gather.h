// When a gemm with an act-order gathers x before it multiplies.
#pragma once

#include "problem.h"

namespace exllama::cuda {

// A kernel that multiplies in the order of the words looks up the column of x for each of its rows. It does so again in
// every tile of columns. From so many rows of x on, one kernel does it before: it brings x into the order of the words. For
// fewer rows that launch would take longer than the look-ups. Kernels for more rows at a time look nothing up. Rows of a
// dense W are written in the order of x.
inline constexpr int64_t kGatheredRows = 5;
inline constexpr int64_t kMaxRowsThatLookUp = 8;

constexpr bool gathers_x(bool has_perm, int64_t M, const Config& config) {
  return has_perm && (M >= kGatheredRows || config.rows > kMaxRowsThatLookUp) && config.algorithm != Algorithm::kDense;
}

}  // namespace exllama::cuda
