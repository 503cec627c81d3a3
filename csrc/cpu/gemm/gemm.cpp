// out = x @ W of each part: x is packed span by span. Then each task walks down the spans with its tile of the result.
//
// What happens to one row of x and one span depends on that row and span alone, and spans are added in ascending order.
// So the result of a row does not depend on M or on the threads. Nor does it on the experts that are computed beside it.
#include <algorithm>
#include <deque>
#include <optional>

#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/exact.h"
#include "cpu/gemm/packed_x.h"
#include "cpu/gemm/panel_sums.h"
#include "cpu/gemm/partition.h"
#include "cpu/gemm/parts.h"
#include "cpu/gemm/plan.h"
#include "cpu/gemm/schedule.h"
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

// One product, in three steps: pack all entries of x, divide the result into tasks, run them.
class Gemm {
 public:
  // `sums` are for the tiles of each worker, tile_sums of them.
  Gemm(const Parts& parts, const void* x, DType dtype, int64_t M, void* out, NumberClass numbers, Arena& arena,
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
  Gemm(const Gemm&) = delete;

  // An entry is a row of x in a span; those of a row follow one another.
  int64_t entries() const { return source_.M * spans_.count(); }
  void pack(int64_t begin, int64_t end) const {
    const XPacker packer(isa_, source_, plan_, format_, x_);
    while (begin < end) {
      const int64_t m = begin / spans_.count(), span = begin - m * spans_.count();
      const int64_t stop = std::min(spans_.count(), span + end - begin);
      packer.pack(m, span, stop);
      begin += stop - span;
    }
  }

  // This comes after packing. Integers straight from the words must be finite: panels take x otherwise.
  void settle() {
    if (!plan_.gemv || plan_.numbers == NumberClass::kFloat || all_finite()) return;
    plan_ = plan_of(isa_, format_, plan_.numbers, kGemvRows + 1);
    pack(0, entries());
  }

  // Whether x is multiplied straight from the words.
  bool gemv() const { return plan_.gemv; }
  int64_t columns() const { return columns_; }
  int64_t word_bytes() const { return columns_ * format_.K * format_.bits / 8; }

  // Into tasks for so many threads. Straight from the words there are no more tasks than threads, since DRAM is read
  // best in long rows of words.
  void divide(int32_t threads) {
    const auto ranges_of = [&](int64_t width) { return parts_.ranges(width); };
    if (!plan_.gemv) {
      partition_.emplace(source_.M, threads, ranges_of);
      return;
    }
    const int64_t most_columns = kGemvSums / kPanelColumns / source_.M * kPanelColumns;
    gemv_width_ = std::min(most_columns, round_up(ceil_div(columns_, threads), kPanelColumns));
  }
  int64_t tasks() const { return plan_.gemv ? parts_.ranges(gemv_width_) : partition_->tiles(); }

  void run(int64_t task, int32_t worker) const {
    if (plan_.gemv) return multiply_words(parts_.range(task, gemv_width_));
    const Tile tile = (*partition_)[task];
    multiply(tile.row, tile.rows, parts_.range(tile.range, partition_->width()), sums_ + worker * tile_sums_);
  }

 private:
  bool all_finite() const {
    return std::all_of(x_.scales, x_.scales + entries(), [](const SpanScale& s) { return s.limbs != Limbs::kNone; });
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
  const PackedX x_;
  float* const sums_;  // [worker][sums of a tile]
  int64_t gemv_width_ = 0;
  std::optional<Partition> partition_;
  const FloatClass floats_;
  const IntegerClass integers_;
};

// Threads for the tasks of a product, which may be some that begin at once.
int32_t threads_for(const Gemm& product, const Parallel& parallel) {
  return product.gemv() ? threads_for_columns(parallel, product.columns(), product.word_bytes()) : parallel.threads;
}

// Into how many tasks each of some equal products is cut: as few as give no thread a sixteenth more than its share.
int64_t pieces_of(int64_t products, int32_t threads) {
  int64_t pieces = 1;
  while (16 * ceil_div(products * pieces, threads) * threads > 17 * products * pieces) ++pieces;
  return pieces;
}

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
  Arena arena(workspace);
  const int64_t sums_of_tile = tile_sums(Parts{parts, count}.widest(), M);
  float* const sums = arena.take<float>(parallel.threads * sums_of_tile);
  Gemm product({parts, count}, x, x_dtype, M, out, class_of(*parts, precision), arena, sums, sums_of_tile);
  const int64_t entries = product.entries();
  if (M * parts->K < kParallelEntries) {
    product.pack(0, entries);
  } else {
    const int64_t tasks = 4 * parallel.threads;
    for_each(parallel, tasks,
             [&](int64_t task) { product.pack(entries * task / tasks, entries * (task + 1) / tasks); });
  }
  product.settle();
  product.divide(threads_for(product, parallel));
  for_each(parallel, product.tasks(), [&](int64_t task, int32_t worker) { product.run(task, worker); });
}

size_t moe_gemm_workspace_bytes(const Expert* experts, int64_t count, Precision precision, int32_t threads) {
  Arena arena(nullptr);
  int64_t most_sums = 0;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    const PackedX x(arena, expert->weight, expert->rows, class_of(expert->weight, precision));
    most_sums = std::max(most_sums, tile_sums(expert->weight.N, expert->rows));
  }
  arena.take<float>(threads * most_sums);
  return arena.bytes();
}

void moe_gemm(const Expert* experts, int64_t count, const void* x, DType x_dtype, void* out, Precision precision,
              void* workspace, const Parallel& parallel) {
  Arena arena(workspace);
  int64_t most_sums = 0, rows = 0;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    most_sums = std::max(most_sums, tile_sums(expert->weight.N, expert->rows));
    rows += expert->rows;
  }
  float* const sums = arena.take<float>(parallel.threads * most_sums);
  std::deque<Gemm> products;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    const Weight& weight = expert->weight;
    products.emplace_back(Parts{&weight, 1}, offset(x, x_dtype, expert->first_row * weight.in_features), x_dtype,
                          expert->rows, offset(out, x_dtype, expert->first_row * weight.N), class_of(weight, precision),
                          arena, sums, most_sums);
  }
  const auto product = [&](int64_t i) -> Gemm& { return products[static_cast<size_t>(i)]; };

  const Schedule packing(count, [&](int64_t i) { return product(i).entries(); });
  const auto pack = [&](int64_t begin, int64_t end) {
    packing.each(begin, end, [&](int64_t i, int64_t first, int64_t last) { product(i).pack(first, last); });
  };
  const int64_t entries = packing.tasks(),
                packs = rows * experts->weight.K < kParallelEntries ? 1 : 4 * parallel.threads;
  for_each(parallel, packs, [&](int64_t task) { pack(entries * task / packs, entries * (task + 1) / packs); });

  // All products together are divided as one is, and each has its part of the tasks.
  bool gemv = true;
  for (Gemm& each : products) {
    each.settle();
    gemv &= each.gemv();
  }
  Parallel together = parallel;
  if (gemv) {
    together.threads = threads_for_columns(parallel, count * product(0).columns(), count * product(0).word_bytes());
  }
  const int64_t pieces = pieces_of(count, together.threads);
  for (Gemm& each : products) {
    const int64_t most = std::max<int64_t>(1, each.columns() / kColumnsOfThread);
    each.divide(static_cast<int32_t>(each.gemv() ? std::min(pieces, most) : ceil_div(together.threads, count)));
  }
  const Schedule schedule(count, [&](int64_t i) { return product(i).tasks(); });
  for_each(together, schedule.tasks(), [&](int64_t task, int32_t worker) {
    schedule.each(task, task + 1, [&](int64_t i, int64_t own, int64_t) { product(i).run(own, worker); });
  });
}

}  // namespace exllama::cpu
