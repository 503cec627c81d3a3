#include <algorithm>

#include "cpu/gemm/panel_sums.h"
#include "cpu/rows.h"

namespace exllama::cpu {

void FloatClass::add(const PanelSums& sums, Ahead& ahead) const {
  alignas(64) float panel[kSpanRows * kPanelColumns];
  float scales[kPanelColumns];
  const Weight& weight = sums.weight;
  const Span& span = sums.span;
  if (Spans::grouped(weight)) {
    int32_t zeros[kPanelColumns];
    isa_.load_zeros(weight, span.group, sums.column, sums.columns, zeros);
    isa_.load_scales(weight, span.group, sums.column, sums.columns, scales);
    isa_.unpack_float(weight, span.row, span.rows, sums.column, sums.columns, zeros, nullptr, panel);
  } else {
    unpack_scaled(isa_, weight, span.row, span.rows, 0, sums.column, sums.columns, panel);
    std::fill(scales, scales + kPanelColumns, 1.0f);
  }
  Multiply<float, float> product;
  product.x = x_.floats + x_.entry(sums.span_index, sums.row) * x_.stride;
  product.x_stride = x_.stride;
  product.rows = sums.rows;
  product.depth = span.rows;
  product.panel = panel;
  product.columns = sums.columns;
  product.scales = scales;
  product.acc = sums.acc;
  isa_.multiply_float(product, ahead);
}

}  // namespace exllama::cpu
