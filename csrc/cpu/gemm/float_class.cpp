#include <algorithm>
#include <cstring>

#include "cpu/gemm/panel_sums.h"
#include "cpu/rows.h"

namespace exllama::cpu {
namespace {

template <typename Panel>
Multiply<float, Panel> product_of(const PackedX& x, const PanelSums& sums, const Panel* panel, const float* scales) {
  Multiply<float, Panel> product;
  product.x = x.floats + x.entry(sums.span_index, sums.row) * x.stride;
  product.x_stride = x.stride;
  product.rows = sums.rows;
  product.depth = sums.span.rows;
  product.panel = panel;
  product.columns = sums.columns;
  product.scales = scales;
  product.acc = sums.acc;
  return product;
}

}  // namespace

void FloatClass::add_words(const PanelSums& sums, Ahead& ahead) const {
  alignas(64) uint32_t words[kSpanRows * 8 / 32 * kPanelColumns];
  alignas(64) int32_t zeros[kPanelColumns];
  alignas(64) float scales[kPanelColumns];
  const Weight& weight = sums.weight;
  const Span& span = sums.span;
  isa_.load_zeros(weight, span.group, sums.column, sums.columns, zeros);
  isa_.load_scales(weight, span.group, sums.column, sums.columns, scales);
  const uint32_t* source = words_of(weight, span.row, sums.column);
  for (int i = 0; i < span.rows * weight.bits / 32; ++i) {
    std::memcpy(words + i * kPanelColumns, source + i * weight.N, sums.columns * sizeof(uint32_t));
  }
  Multiply<float, uint32_t> product = product_of(x_, sums, words, scales);
  product.zeros = zeros;
  isa_.multiply_float_words(product, weight.bits, ahead);
}

void FloatClass::add(const PanelSums& sums, Ahead& ahead) const {
  if (plan_.float_words) return add_words(sums, ahead);
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
  isa_.multiply_float(product_of(x_, sums, panel, scales), ahead);
}

}  // namespace exllama::cpu
