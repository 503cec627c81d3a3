// Weights that one x is multiplied with in one launch, side by side. One weight is one part.
#pragma once

#include "../layout/weight.h"

namespace exllama::cuda {

using layout::DType;
using layout::Weight;

inline constexpr int kMaxParts = 8;  // of a launch: they are its arguments, of which there may be 4 KiB

// What one weight has for itself.
struct Part {
  const uint32_t* qweight;
  const uint32_t* qzeros;
  const void* scales;
  DType scales_dtype;
  uint32_t end_tile;  // one after its last tile of columns, counted from the launch's first tile on
  int64_t N;
  int64_t columns_before;  // in out: those of the parts before it
};

struct Parts {
  Weight weight;  // the first: all have its K, groups, rows and format
  uint32_t column_tiles;
  int64_t columns;  // of out, for which there may be more parts than these
  Part part[kMaxParts];
};

#ifdef __CUDACC__
// The columns and rows of a thread block of a grid (column tiles * row tiles, splits). Blocks that follow one another
// have the same columns and other rows of x: together they read W from DRAM once, however many rows there are.
struct Tile {
  Weight weight;  // that they belong to
  int64_t first_column;
  int64_t columns_before;  // in out: those of the weights before this one
  int64_t first_row;       // of x and out

  // Each of `columns` columns and `rows` rows.
  __device__ Tile(const Parts& parts, int columns, int rows) : weight(parts.weight) {
    const uint32_t row_tiles = gridDim.x / parts.column_tiles, tile = blockIdx.x / row_tiles;
    first_row = static_cast<int64_t>(blockIdx.x % row_tiles) * rows;
    uint32_t first_tile = 0;
    int i = 0;
    while (tile >= parts.part[i].end_tile) first_tile = parts.part[i++].end_tile;
    const Part& part = parts.part[i];
    weight.qweight = part.qweight;
    weight.qzeros = part.qzeros;
    weight.scales = part.scales;
    weight.scales_dtype = part.scales_dtype;
    weight.N = part.N;
    first_column = static_cast<int64_t>(tile - first_tile) * columns;
    columns_before = part.columns_before;
  }
};
#endif

}  // namespace exllama::cuda
