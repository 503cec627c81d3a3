// out = x @ W of each part: x is packed span by span. Then each task walks down the spans with its tile of the result.
//
// What happens to one row of x and one span depends on that row and span alone, and spans are added in ascending order.
// So the result of a row does not depend on M or on the threads.
#include <algorithm>

#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/exact.h"
#include "cpu/gemm/packed_x.h"
#include "cpu/gemm/panel_sums.h"
#include "cpu/gemm/partition.h"
#include "cpu/gemm/parts.h"
#include "cpu/gemm/plan.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace exllama::cpu {
namespace {

// Below this many entries of x, packing takes less time than waking threads.
constexpr int64_t kParallelEntries = 1 << 16;

int64_t panels_of(int64_t width) { return ceil_div(width, kPanelColumns); }
int columns_of_panel(int64_t panel, int64_t width) {
  return static_cast<int>(std::min<int64_t>(kPanelColumns, width - panel * kPanelColumns));
}

class Gemm {
 public:
  Gemm(const Parts& parts, const void* x, DType dtype, int64_t M, void* out, NumberClass numbers, void* workspace,
       int32_t threads)
      : parts_(parts),
        format_(*parts.begin()),
        columns_(parts.columns()),
        tile_sums_(tile_sums(parts.widest(), M)),
        source_{x, dtype, M, format_.in_features, format_.perm()},
        out_(out),
        plan_(plan_of(isa_, format_, numbers, M)),
        spans_(format_, kSpanRows),
        arena_(workspace),
        x_(arena_, format_, M, numbers),
        sums_(arena_.take<float>(threads * tile_sums_)),
        floats_(isa_, x_, plan_),
        integers_(isa_, x_, source_, plan_) {}
  Gemm(const Gemm&) = delete;

  void run(const Parallel& parallel) {
    pack(parallel);
    if (plan_.gemv) {
      if (plan_.numbers == NumberClass::kFloat || all_finite()) return run_gemv(parallel);
      // Panels take x otherwise.
      plan_ = plan_of(isa_, format_, plan_.numbers, kGemvRows + 1);
      pack(parallel);
    }
    const Partition partition(source_.M, parallel.threads, [&](int64_t width) { return parts_.ranges(width); });
    for_each(parallel, partition.tiles(), [&](int64_t task, int32_t worker) {
      const Tile tile = partition[task];
      multiply(tile.row, tile.rows, parts_.range(tile.range, partition.width()), sums_ + worker * tile_sums_);
    });
  }

 private:
  void pack(const Parallel& parallel) const {
    const XPacker packer(isa_, source_, plan_, format_, x_);
    if (source_.M * format_.K < kParallelEntries) {
      for (int64_t m = 0; m < source_.M; ++m) packer.pack(m, 0, spans_.count());
      return;
    }
    const int64_t entries = spans_.count() * source_.M, tasks = 4 * parallel.threads;
    for_each(parallel, tasks, [&](int64_t task) {
      for (int64_t i = entries * task / tasks; i < entries * (task + 1) / tasks; ++i) {
        packer.pack(i / spans_.count(), i % spans_.count(), i % spans_.count() + 1);
      }
    });
  }

  bool all_finite() const {
    const int64_t entries = spans_.count() * source_.M;
    return std::all_of(x_.scales, x_.scales + entries, [](const SpanScale& s) { return s.limbs != Limbs::kNone; });
  }

  void run_gemv(const Parallel& parallel) const {
    // DRAM is read best in long rows of words, so there are no more tasks than threads.
    const int64_t most_columns = kGemvSums / kPanelColumns / source_.M * kPanelColumns;
    const int32_t threads = threads_for_columns(parallel, columns_, columns_ * format_.K * format_.bits / 8);
    const int64_t width = std::min(most_columns, round_up(ceil_div(columns_, threads), kPanelColumns));
    for_each(parallel, parts_.ranges(width), [&](int64_t task) { multiply_words(parts_.range(task, width)); });
  }

  // All rows of x, straight from the words.
  void multiply_words(const Range& range) const {
    alignas(64) float acc[kGemvSums];
    const int columns = static_cast<int>(range.width), rows = static_cast<int>(source_.M);
    const int64_t stride = round_up(columns, kPanelColumns);
    std::fill(acc, acc + rows * stride, 0.0f);
    Gemv gemv;
    gemv.weight = &range.weight;
    gemv.rows = rows;
    const bool floats = plan_.numbers == NumberClass::kFloat;
    gemv.x = floats ? static_cast<const void*>(x_.floats) : plan_.int8 ? static_cast<const void*>(x_.bytes) : x_.first;
    gemv.x_second = x_.second;
    gemv.int8 = plan_.int8;
    gemv.x_stride = x_.stride;
    gemv.x_scales = x_.scales;
    gemv.column = range.column;
    gemv.columns = columns;
    gemv.acc = acc;
    (floats ? isa_.gemv_float : isa_.gemv)(gemv);
    bool finite = true;
    for (int m = 0; m < rows; ++m) finite &= store(acc + m * stride, columns, m, range.out_column);
    for (int m = 0; !finite && m < rows; ++m) multiply_exactly(m, range, acc + m * stride, kPanelColumns);
  }

  // `rows` rows of x from `row` on, by a range of columns. The sums of each panel are contiguous.
  void multiply(int64_t row, int rows, const Range& range, float* acc) const {
    const Weight& weight = range.weight;
    const bool integers = plan_.numbers != NumberClass::kFloat;
    const int64_t panels = panels_of(range.width), panel_sums = rows * kPanelColumns;
    const WordLines lines(weight, spans_.longest(), kPanelColumns);
    std::fill(acc, acc + panels * panel_sums, 0.0f);
    if (plan_.unit) plan_.unit->start(unit_step(*plan_.unit, weight));
    for (int64_t s = 0; s < spans_.count(); ++s) {
      const bool last = s + 1 == spans_.count();
      const Span span = spans_[s], next = last ? span : spans_[s + 1];
      Runs runs;
      if (integers) integers_.find_runs(s, row, rows, runs);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = range.column + panel * kPanelColumns;
        const int columns = columns_of_panel(panel, range.width);
        const PanelSums sums{weight, s, span, row, rows, column, columns, acc + panel * panel_sums};
        Ahead ahead = last ? Ahead{} : words_ahead(weight, lines, next, column, columns);
        if (integers) {
          integers_.add(sums, runs, ahead);
        } else {
          floats_.add(sums, ahead);
        }
      }
    }
    if (plan_.unit) plan_.unit->stop();
    bool finite = true;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int m = 0; m < rows; ++m) {
        finite &= store(acc + panel * panel_sums + m * kPanelColumns, columns_of_panel(panel, range.width), row + m,
                        range.out_column + panel * kPanelColumns);
      }
    }
    for (int m = 0; !finite && m < rows; ++m) multiply_exactly(row + m, range, acc + m * kPanelColumns, panel_sums);
  }

  // The words of a panel of a span, for prefetching. Its zero points and scales are prefetched here.
  Ahead words_ahead(const Weight& weight, const WordLines& lines, const Span& span, int64_t column, int columns) const {
    if (Spans::grouped(weight)) {
      const int64_t index = span.group * weight.N + column;
      prefetch_to_l1(weight.qzeros + index * weight.bits / 32);
      const char* scales = static_cast<const char*>(offset(weight.scales, weight.scales_dtype, index));
      for (int64_t byte = 0; byte < columns * bytes_of(weight.scales_dtype); byte += 64) prefetch_to_l1(scales + byte);
    }
    return lines.from(words_of(weight, span.row, column));
  }

  // Whether all sums are finite.
  bool store(const float* sums, int columns, int64_t m, int64_t out_column) const {
    return isa_.store(sums, columns, out_at(m, out_column), source_.dtype);
  }

  // Where the sums of row m are not finite. Those of one panel are `panel_sums` after those of the last.
  void multiply_exactly(int64_t m, const Range& range, const float* sums, int64_t panel_sums) const {
    const ExactRow row(source_.row(m), source_.dtype, source_.perm, source_.K);
    for (int64_t panel = 0; panel < panels_of(range.width); ++panel, sums += panel_sums) {
      const int64_t n = panel * kPanelColumns;
      row.multiply(range.weight, range.column + n, columns_of_panel(panel, range.width), sums,
                   out_at(m, range.out_column + n));
    }
  }

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
  Arena arena_;
  const PackedX x_;
  float* const sums_;  // [worker][sums of a tile]
  const FloatClass floats_;
  const IntegerClass integers_;
};

}  // namespace

size_t gemm_workspace_bytes(const Weight* parts, int64_t count, int64_t M, Precision precision, int32_t threads) {
  Arena arena(nullptr);
  const PackedX x(arena, *parts, M, class_of(*parts, precision));
  arena.take<float>(threads * tile_sums(Parts{parts, count}.widest(), M));
  return arena.bytes();
}

void gemm(const Weight* parts, int64_t count, const void* x, DType x_dtype, int64_t M, void* out, Precision precision,
          void* workspace, const Parallel& parallel) {
  if (M == 0) return;
  Gemm({parts, count}, x, x_dtype, M, out, class_of(*parts, precision), workspace, parallel.threads).run(parallel);
}

}  // namespace exllama::cpu
