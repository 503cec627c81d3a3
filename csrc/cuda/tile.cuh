// The tile of a thread block: its weight, its columns and its rows, among those of several parts or several experts.
#pragma once

#include "parts.h"

namespace exllama::cuda {

// Rows of x that lie in one tile of their expert, or of no expert (-1). Behind all tiles there are none.
struct RowsOfTile {
  int64_t first, end;  // end: after the last one of the expert, which other tiles may have
  int32_t expert;
};

inline constexpr int kMaxWarps = 8;  // of a thread block that looks for its expert

// Finds the rows of a tile of `rows` rows by the offsets, which are checked: offsets that decrease, or leave [0, M], stop
// the kernel. All threads of a thread block call it, and all get the same. A thread counts the tiles of some runs. A scan
// over the threads says whose runs have the tile. The offsets are what the kernel before may have written.
static __device__ inline RowsOfTile rows_of_tile(const Experts& experts, int64_t M, uint32_t tile, int rows) {
  __shared__ uint32_t s_tiles_of_warps[kMaxWarps];
  __shared__ RowsOfTile s_found;
  const int count = static_cast<int>(experts.count), runs = count + 2, threads = blockDim.x, thread = threadIdx.x;
  const int each = (runs + threads - 1) / threads, first_run = min(thread * each, runs);
  const int end_run = min(first_run + each, runs);
  const auto start_of = [&](int run) { return run == 0 ? 0 : run > count + 1 ? M : experts.offsets[run - 1]; };
  const auto tiles_of = [&](int64_t start, int64_t end) {
    return static_cast<uint32_t>((end - start + rows - 1) / rows);
  };

  uint32_t tiles = 0;
  bool ascend = true;
  int64_t start = start_of(first_run);
  for (int run = first_run; run < end_run; ++run) {
    const int64_t end = start_of(run + 1);
    ascend &= start <= end;
    tiles += tiles_of(start, end);
    start = end;
  }
  if (!ascend) __trap();   // not in the loop, where the next load would wait for it
  uint32_t up_to = tiles;  // and this thread's
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffff, up_to, distance);
    if (thread % 32 >= distance) up_to += before;
  }
  if (thread % 32 == 31) s_tiles_of_warps[thread / 32] = up_to;
  __syncthreads();
  for (int warp = 0; warp < thread / 32; ++warp) up_to += s_tiles_of_warps[warp];

  if (thread == threads - 1 && tile >= up_to) s_found = {M, M, -1};
  uint32_t left = tile - (up_to - tiles);  // tiles before it in this thread's runs, if it is one of them
  if (left < tiles) {
    int run = first_run;
    start = start_of(run);
    int64_t end = start_of(run + 1);
    for (; left >= tiles_of(start, end); end = start_of(run + 1)) {
      left -= tiles_of(start, end);
      start = end;
      ++run;
    }
    s_found = {start + static_cast<int64_t>(left) * rows, end, run <= count ? run - 1 : -1};
  }
  __syncthreads();
  return s_found;
}

// In a grid (column tiles * row tiles, splits). Thread blocks that follow one another have the same columns and other
// rows of x. Together they read W from DRAM once, however many rows there are.
struct Tile {
  Weight weight;           // the part or the expert that it belongs to
  int64_t first_column;    // of the part
  int64_t columns_before;  // columns of out that belong to the parts before it
  int64_t first_row;       // of x and out
  int64_t end_row;         // rows of others begin here: M, or where the expert ends
  bool has_weight = true;  // if not, its rows belong to no expert, and their result is 0

  // Tiles have `columns` columns and `rows` rows.
  __device__ Tile(const Parts& parts, int columns, int rows, int64_t M) : weight(parts.weight), end_row(M) {
    const uint32_t row_tiles = gridDim.x / parts.column_tiles, tile = blockIdx.x / row_tiles;
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
    if (parts.experts.offsets) {
      take_rows(rows_of_tile(parts.experts, M, blockIdx.x % row_tiles, rows));
    } else {
      first_row = static_cast<int64_t>(blockIdx.x % row_tiles) * rows;
    }
  }

  // A tile behind those of all experts.
  __device__ bool is_empty() const { return first_row >= end_row; }

 private:
  __device__ void take_rows(const RowsOfTile& found) {
    first_row = found.first;
    end_row = found.end;
    has_weight = found.expert >= 0;
    if (!has_weight) weight.row_order = nullptr;
    const int64_t expert = max(found.expert, 0), numbers = expert * weight.G * weight.N;
    weight.qweight += expert * (weight.K * weight.bits / 32) * weight.N;
    weight.qzeros += expert * weight.G * (weight.N * weight.bits / 32);
    weight.scales = static_cast<const char*>(weight.scales) + numbers * layout::bytes_of(weight.scales_dtype);
    if (weight.row_order) weight.row_order += expert * weight.K;
  }
};

}  // namespace exllama::cuda
