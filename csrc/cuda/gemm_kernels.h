// Each function launches one gemm kernel; gemm.cu chooses between them.
#pragma once

#include "cuda.h"
#include "parts.h"
#include "splits.h"

namespace exllama::cuda {

struct GemmArguments {
  const Weight* parts;
  int64_t count;           // at most kMaxParts
  int64_t columns_before;  // columns of out that belong to the parts of launches before this one
  int64_t columns;         // of out
  const void* x;
  DType dtype;         // of x and out
  bool x_is_gathered;  // the columns of x are in the order of the words, whatever order the weight has
  int64_t M;
  void* out;
  Splits splits;  // of (split_k, M, columns) sums
  Experts experts;
};

// Tiles of so many rows: each has as many thread blocks as there are tiles of columns and splits.
inline int64_t row_tiles(const GemmArguments& a, int64_t rows) { return most_row_tiles(a.M, a.experts.count, rows); }

// The parts as a kernel takes them, whose tiles have tile_columns columns.
Parts parts_of(const GemmArguments& arguments, int tile_columns);

void launch_gemm_scalar(const GemmArguments& arguments, const Config& config, Stream stream);
void launch_gemm_mma(const GemmArguments& arguments, const Config& config, Stream stream);
void launch_gemm_pipelined(const GemmArguments& arguments, const Config& config, Stream stream);
void launch_gemm_tiled(const GemmArguments& arguments, Stream stream);

}  // namespace exllama::cuda
