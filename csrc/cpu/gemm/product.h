// x @ W of some parts: one product, in steps that take any threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/arena.h"
#include "cpu/gemm/packed_x.h"
#include "cpu/gemm/panel_sums.h"
#include "cpu/gemm/partition.h"
#include "cpu/gemm/parts.h"
#include "cpu/gemm/plan.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// Below this many entries of x, packing takes less time than waking threads.
constexpr int64_t kParallelEntries = 1 << 16;

// Pack all entries of x, settle, divide the result into tasks, run them.
//
// What happens to one row of x and one span depends on that row and span alone, and spans are added in ascending order.
// So the result of a row does not depend on M or on the threads. Nor does it on the products that run beside it.
class Product {
 public:
  // `sums` are for the tiles of each worker, tile_sums of them.
  Product(const Parts& parts, const void* x, DType dtype, int64_t M, void* out, NumberClass numbers, Arena& arena,
          float* sums, int64_t tile_sums)
      : parts_(parts),
        format_(*parts.begin()),
        columns_(parts.columns()),
        tile_sums_(tile_sums),
        source_{x, dtype, M, format_.in_features, format_.perm()},
        out_(out),
        plan_(plan_of(isa_, format_, numbers, M)),
        spans_(format_, kSpanRows),
        x_(arena, format_, M, numbers),
        sums_(sums),
        floats_(isa_, x_, plan_),
        integers_(isa_, x_, source_, plan_) {}
  Product(const Product&) = delete;

  // An entry is a row of x in a span; those of a row follow one another.
  int64_t entries() const { return source_.M * spans_.count(); }
  void pack(int64_t begin, int64_t end) const;

  // This comes after packing. Integers straight from the words must be finite: panels take x otherwise.
  void settle();

  // Whether x is multiplied straight from the words.
  bool gemv() const { return plan_.gemv; }
  int64_t columns() const { return columns_; }
  int64_t word_bytes() const { return columns_ * format_.K * format_.bits / 8; }

  // Into tasks for so many threads. Straight from the words there are no more tasks than threads, since DRAM is read
  // best in long rows of words.
  void divide(int32_t threads);
  int64_t tasks() const { return plan_.gemv ? parts_.ranges(gemv_width_) : partition_->tiles(); }
  void run(int64_t task, int32_t worker) const;

 private:
  bool all_finite() const {
    return std::all_of(x_.scales, x_.scales + entries(), [](const SpanScale& s) { return s.limbs != Limbs::kNone; });
  }
  void multiply_words(const Range& range) const;
  void multiply(int64_t row, int rows, const Range& range, float* acc) const;
  Ahead words_ahead(const Weight& weight, const WordLines& lines, const Span& span, int64_t column, int columns) const;
  bool store(const float* sums, int columns, int64_t m, int64_t out_column) const;
  void multiply_exactly(int64_t m, const Range& range, const float* sums, int64_t panel_sums) const;
  void* out_at(int64_t m, int64_t column) const { return offset(out_, source_.dtype, m * columns_ + column); }

  const Kernels& isa_ = kernels();
  const Parts parts_;
  const Weight& format_;  // what the parts have in common
  const int64_t columns_;
  const int64_t tile_sums_;
  const Source source_;
  void* const out_;
  Plan plan_;
  const Spans spans_;
  const PackedX x_;
  float* const sums_;  // [worker][sums of a tile]
  int64_t gemv_width_ = 0;
  std::optional<Partition> partition_;
  const FloatClass floats_;
  const IntegerClass integers_;
};

}  // namespace exllama::cpu
