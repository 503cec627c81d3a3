#include <algorithm>

#include "cpu/gemm/panel_sums.h"

namespace exllama::cpu {

struct IntegerClass::Columns {
  alignas(64) int32_t zeros[kPanelColumns];
  alignas(64) float scales[kPanelColumns];
};

void IntegerClass::find_runs(int64_t span_index, int64_t row, int rows, Runs& found) const {
  const SpanScale* scales = x_.scales + x_.entry(span_index, row);
  bool any_second = true;
  for (int limb = 0; limb < 2 && any_second; ++limb) {
    int length = 0;
    any_second = false;
    for (int m = 0; m < rows; ++m) {
      const Limbs limbs = scales[m].limbs;
      any_second |= limbs == Limbs::kTwo;
      if (limbs == Limbs::kNone) found.all_finite = false;
      const bool takes_part = limbs == Limbs::kTwo || (limbs == Limbs::kOne && limb == 0);
      length = takes_part ? length + 1 : 0;
      if (length == 1) found.runs[found.count++] = {m, 0, limb};
      if (takes_part) ++found.runs[found.count - 1].count;
    }
  }
}

void IntegerClass::add(const PanelSums& sums, const Runs& runs, Ahead& ahead) const {
  // With so few rows the unit is done as soon as the unpacking, which takes a share of what is ahead too.
  if (plan_.unit && sums.rows <= plan_.unit->rows) ahead.prefetch(3);
  Columns columns;
  isa_.load_zeros(sums.weight, sums.span.group, sums.column, sums.columns, columns.zeros);
  isa_.load_scales(sums.weight, sums.span.group, sums.column, sums.columns, columns.scales);
  if (!runs.all_finite) add_not_finite(sums, columns);
  if (plan_.words) {
    add_words(sums, runs, columns, ahead);
  } else if (plan_.unit || plan_.int8) {
    add_int8(sums, runs, columns, ahead);
  } else {
    add_int16(sums, runs, columns, ahead);
  }
}

void IntegerClass::add_words(const PanelSums& sums, const Runs& runs, const Columns& columns, Ahead& ahead) const {
  const int64_t entry = x_.entry(sums.span_index, sums.row);
  MultiplyWords product;
  product.weight = &sums.weight;
  product.row = sums.span.row;
  product.depth = sums.span.rows;
  product.column = sums.column;
  product.columns = sums.columns;
  product.int8 = plan_.int8;
  product.x_stride = x_.stride * (plan_.int8 ? 1 : 2);
  product.zeros = columns.zeros;
  product.scales = columns.scales;
  for (const Run& run : runs) {
    const int16_t* limb = run.limb == 0 ? x_.first : x_.second;
    const void* x = plan_.int8 ? static_cast<const void*>(x_.bytes) : limb;
    product.x = static_cast<const char*>(x) + (entry + run.first) * product.x_stride;
    product.x_scales = x_.scales + entry + run.first;
    product.limb = run.limb;
    product.rows = run.count;
    product.acc = sums.acc + run.first * kPanelColumns;
    isa_.multiply_words(product, ahead);
  }
}

void IntegerClass::add_int16(const PanelSums& sums, const Runs& runs, const Columns& columns, Ahead& ahead) const {
  alignas(64) int16_t panel[kSpanRows * kPanelColumns];
  const Span& span = sums.span;
  isa_.unpack_int16(sums.weight, span.row, span.rows, sums.column, sums.columns, columns.zeros, panel);
  const int64_t entry = x_.entry(sums.span_index, sums.row);
  Multiply<int16_t, int16_t> product;
  product.x_stride = x_.stride;
  product.depth = span.rows;
  product.panel = panel;
  product.columns = sums.columns;
  product.scales = columns.scales;
  for (const Run& run : runs) {
    product.x = (run.limb == 0 ? x_.first : x_.second) + (entry + run.first) * x_.stride;
    product.x_scales = x_.scales + entry + run.first;
    product.limb = run.limb;
    product.rows = run.count;
    product.acc = sums.acc + run.first * kPanelColumns;
    isa_.multiply_int16(product, ahead);
  }
}

void IntegerClass::add_int8(const PanelSums& sums, const Runs& runs, Columns& columns, Ahead& ahead) const {
  alignas(64) int8_t panel[kSpanRows * kPanelColumns];
  alignas(64) int32_t start[kPanelColumns];
  const Span& span = sums.span;
  isa_.unpack_int8(sums.weight, span.row, span.rows, sums.column, sums.columns, columns.zeros, panel, start);
  // What of the zero points is not in the panel comes at the end. A centered panel of 8 bits holds q - 128.
  const bool centered = isa_.int8_panels == Int8Panels::kCentered, whole_zero = centered && sums.weight.bits != 8;
  const int32_t offset = centered ? kInt8Offset : 0;
  if (!whole_zero) std::for_each(columns.zeros, columns.zeros + kPanelColumns, [=](int32_t& z) { z -= offset; });
  const int32_t* zeros = whole_zero ? nullptr : columns.zeros;
  const int64_t entry = x_.entry(sums.span_index, sums.row);
  for (const Run& run : runs) {
    const SpanScale* x_scales = x_.scales + entry + run.first;
    float* acc = sums.acc + run.first * kPanelColumns;
    if (!plan_.unit) {
      Multiply<uint8_t, int8_t> product;
      product.x = x_.bytes + (entry + run.first) * x_.stride;
      product.x_stride = x_.stride;
      product.x_scales = x_scales;
      product.rows = run.count;
      product.depth = span.rows;
      product.panel = panel;
      product.columns = sums.columns;
      product.scales = columns.scales;
      product.acc = acc;
      product.start = start;
      product.zeros = zeros;
      isa_.multiply_int8(product, ahead);
      continue;
    }
    MultiplyBytes product;
    product.two_bytes = plan_.numbers == NumberClass::kInt16;
    product.x_stride = product.two_bytes ? 2 * x_.stride : x_.stride;
    const void* x = product.two_bytes ? static_cast<const void*>(run.limb == 0 ? x_.first : x_.second) : x_.bytes;
    product.x = static_cast<const int8_t*>(x) + (entry + run.first) * product.x_stride;
    product.x_scales = x_scales;
    product.limb = run.limb;
    product.rows = run.count;
    product.depth = span.rows;
    product.step = unit_step(*plan_.unit, sums.weight);
    product.panel = panel;
    product.columns = sums.columns;
    product.scales = columns.scales;
    product.start = start;
    product.zeros = zeros;
    product.acc = acc;
    plan_.unit->multiply(product, ahead);
  }
}

// The rows whose x has NaN or inf in this span, in float arithmetic.
void IntegerClass::add_not_finite(const PanelSums& sums, const Columns& columns) const {
  alignas(64) float panel[kSpanRows * kPanelColumns];
  alignas(64) float x[kSpanRows];
  const Span& span = sums.span;
  isa_.unpack_float(sums.weight, span.row, span.rows, sums.column, sums.columns, columns.zeros, nullptr, panel);
  const SpanScale* x_scales = x_.scales + x_.entry(sums.span_index, sums.row);
  for (int m = 0; m < sums.rows; ++m) {
    if (x_scales[m].limbs != Limbs::kNone) continue;
    isa_.load(source_.row(sums.row + m), source_.dtype, source_.perm, span.row, span.rows, x);
    Multiply<float, float> product;
    product.x = x;
    product.x_stride = kSpanRows;
    product.rows = 1;
    product.depth = span.rows;
    product.panel = panel;
    product.columns = sums.columns;
    product.scales = columns.scales;
    product.acc = sums.acc + m * kPanelColumns;
    Ahead nothing{};
    isa_.multiply_float(product, nothing);
  }
}

}  // namespace exllama::cpu
