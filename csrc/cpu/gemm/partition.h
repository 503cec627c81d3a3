// How gemm and gemm_dx cut their result into tiles, one for each task.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// A tile is at most kTileRows rows of x by kTilePanels panels, which go through one span before the next. So rows of
// words are read in runs of 2 KiB. The sums of a tile, 512 KiB at most, and its rows of x in one span, 64 KiB, stay in
// L2.
constexpr int kTileRows = 256, kTilePanels = 8;

// The most sums that a tile of a result with M rows and `columns` columns has.
inline int64_t tile_sums(int64_t columns, int64_t M) {
  return std::min<int64_t>(M, kTileRows) *
         std::min<int64_t>(round_up(columns, kPanelColumns), kTilePanels * kPanelColumns);
}

// Rows of the result, and the index of a range of its columns.
struct Tile {
  int64_t row;
  int rows;
  int64_t range;
};

class Partition {
 public:
  // ranges_of(width) is how many ranges of at most `width` columns there are.
  template <typename RangesOf>
  Partition(int64_t M, int32_t threads, const RangesOf& ranges_of) : M_(M) {
    // Narrow weights and few rows get smaller tiles, so that each thread has some.
    const auto too_few = [&] { return ranges_of(width_) * ceil_div(M, rows_) < 4 * threads; };
    while (width_ > kPanelColumns && too_few()) width_ /= 2;
    while (rows_ > 32 && too_few()) rows_ /= 2;
    ranges_ = ranges_of(width_);
  }

  int64_t width() const { return width_; }
  int64_t tiles() const { return ranges_ * ceil_div(M_, rows_); }
  Tile operator[](int64_t i) const {
    const int64_t row = i / ranges_ * rows_;
    return {row, static_cast<int>(std::min(rows_, M_ - row)), i % ranges_};
  }

 private:
  int64_t M_;
  int64_t rows_ = kTileRows;
  int64_t width_ = kTilePanels * kPanelColumns;
  int64_t ranges_ = 0;
};

}  // namespace exllama::cpu
