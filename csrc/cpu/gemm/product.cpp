// x is packed span by span. Then each task walks down the spans with its tile of the result.
#include "cpu/gemm/product.h"

#include "cpu/convert.h"
#include "cpu/gemm/exact.h"

namespace exllama::cpu {
namespace {

int64_t panels_of(int64_t width) { return ceil_div(width, kPanelColumns); }
int columns_of_panel(int64_t panel, int64_t width) {
  return static_cast<int>(std::min<int64_t>(kPanelColumns, width - panel * kPanelColumns));
}

}  // namespace

void Product::pack(int64_t begin, int64_t end) const {
  const XPacker packer(isa_, source_, plan_, format_, x_);
  while (begin < end) {
    const int64_t m = begin / spans_.count(), span = begin - m * spans_.count();
    const int64_t stop = std::min(spans_.count(), span + end - begin);
    packer.pack(m, span, stop);
    begin += stop - span;
  }
}

void Product::settle() {
  if (!plan_.gemv || plan_.numbers == NumberClass::kFloat || all_finite()) return;
  plan_ = plan_of(isa_, format_, plan_.numbers, kGemvRows + 1);
  pack(0, entries());
}

void Product::divide(int32_t threads) {
  const auto ranges_of = [&](int64_t width) { return parts_.ranges(width); };
  if (!plan_.gemv) {
    partition_.emplace(source_.M, threads, ranges_of);
    return;
  }
  const int64_t most_columns = kGemvSums / kPanelColumns / source_.M * kPanelColumns;
  gemv_width_ = std::min(most_columns, round_up(ceil_div(columns_, threads), kPanelColumns));
}

void Product::run(int64_t task, int32_t worker) const {
  if (plan_.gemv) return multiply_words(parts_.range(task, gemv_width_));
  const Tile tile = (*partition_)[task];
  multiply(tile.row, tile.rows, parts_.range(tile.range, partition_->width()), sums_ + worker * tile_sums_);
}

// All rows of x, straight from the words.
void Product::multiply_words(const Range& range) const {
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
void Product::multiply(int64_t row, int rows, const Range& range, float* acc) const {
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
Ahead Product::words_ahead(const Weight& weight, const WordLines& lines, const Span& span, int64_t column,
                           int columns) const {
  if (Spans::grouped(weight)) {
    const int64_t index = span.group * weight.N + column;
    prefetch_to_l1(weight.qzeros + index * weight.bits / 32);
    const char* scales = static_cast<const char*>(offset(weight.scales, weight.scales_dtype, index));
    for (int64_t byte = 0; byte < columns * bytes_of(weight.scales_dtype); byte += 64) prefetch_to_l1(scales + byte);
  }
  return lines.from(words_of(weight, span.row, column));
}

// Whether all sums are finite.
bool Product::store(const float* sums, int columns, int64_t m, int64_t out_column) const {
  return isa_.store(sums, columns, out_at(m, out_column), source_.dtype);
}

// Where the sums of row m are not finite. Those of one panel are `panel_sums` after those of the last.
void Product::multiply_exactly(int64_t m, const Range& range, const float* sums, int64_t panel_sums) const {
  const ExactRow row(source_.row(m), source_.dtype, source_.perm, source_.K);
  for (int64_t panel = 0; panel < panels_of(range.width); ++panel, sums += panel_sums) {
    const int64_t n = panel * kPanelColumns;
    row.multiply(range.weight, range.column + n, columns_of_panel(panel, range.width), sums,
                 out_at(m, range.out_column + n));
  }
}

}  // namespace exllama::cpu
