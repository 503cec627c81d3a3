// Weights that one x is multiplied with in one launch, side by side. One weight is one part.
#pragma once

#include "../layout/weight.h"

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
  Part part[kMaxParts];
};

#ifdef __CUDACC__
// The tile of a thread block, in a grid (column tiles * row tiles, splits). Thread blocks that follow one another have
// the same columns and other rows of x. Together they read W from DRAM once, however many rows there are.
struct Tile {
  Weight weight;           // the part that it belongs to
  int64_t first_column;    // of the part
  int64_t columns_before;  // columns of out that belong to the parts before it
  int64_t first_row;       // of x and out

  // Tiles have `columns` columns and `rows` rows.
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
