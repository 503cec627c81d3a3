// Experts: weights alike, one behind the other in their stacks, of which each row of x has one. Nothing here needs CUDA.
//
// The rows of x are sorted by expert. Offsets among them, which only the device reads, say where an expert's rows begin.
// The rows before the first offset and those from the last one on belong to no expert. With them, the rows of x are
// count + 2 runs, some of which are empty. Each run has tiles of its own, numbered from the first run to the last.
#pragma once

#include <cstdint>

namespace exllama::cuda {

struct Experts {
  const int32_t* offsets;  // (count + 1,) in the memory of the device; null: one weight has all rows
  int64_t count;           // 0 without offsets
};

// The most tiles of so many rows that M > 0 rows may have, whatever the offsets are: every run but the first may begin
// one more.
constexpr int64_t most_row_tiles(int64_t M, int64_t experts, int64_t rows) {
  const int64_t all_runs = experts > 0 ? experts + 2 : 1, runs = all_runs < M ? all_runs : M;
  return runs + (M - runs) / rows;
}

}  // namespace exllama::cuda
