// Weights that stand side by side, and ranges of their columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// A range of the columns of one part: in the part, and in the result.
struct Range {
  const Weight& weight;
  int64_t column;
  int64_t width;
  int64_t out_column;
};

// The weights of one product: all but their columns is alike.
struct Parts {
  const Weight* weights;
  int64_t count;

  const Weight* begin() const { return weights; }
  const Weight* end() const { return weights + count; }

  int64_t columns() const { return layout::columns_of(weights, count); }
  int64_t widest() const {
    int64_t N = 0;
    for (const Weight& part : *this) N = std::max(N, part.N);
    return N;
  }

  // How many ranges of at most `width` columns there are, each of one part.
  int64_t ranges(int64_t width) const {
    int64_t sum = 0;
    for (const Weight& part : *this) sum += ceil_div(part.N, width);
    return sum;
  }
  Range range(int64_t index, int64_t width) const {
    const Weight* part = begin();
    int64_t before = 0;
    for (; index >= ceil_div(part->N, width); ++part) {
      index -= ceil_div(part->N, width);
      before += part->N;
    }
    const int64_t column = index * width;
    return {*part, column, std::min(width, part->N - column), before + column};
  }
};

}  // namespace exllama::cpu
