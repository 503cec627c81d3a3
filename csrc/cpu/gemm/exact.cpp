#include "cpu/gemm/exact.h"

#include <algorithm>
#include <cmath>

#include "cpu/convert.h"
#include "cpu/isa/scalar/kernels.h"
#include "cpu/rows.h"
#include "cpu/spans.h"

namespace exllama::cpu {
namespace {

// The bits of the largest |value|: they are ordered as the values are, with inf and then NaN above all numbers.
uint32_t largest_bits(const void* values, DType dtype, int64_t count) {
  uint32_t largest = 0;
  if (dtype == DType::kFloat32) {
    const float* floats = static_cast<const float*>(values);
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_bits(floats[i]) & 0x7fffffff);
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, halves[i] & 0x7fffu);
  }
  return largest;
}

uint32_t infinity_of(DType dtype) {
  return dtype == DType::kFloat32 ? 0x7f800000 : dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
}

// The zero points and scales of the group of a row, for a range of columns.
struct Group {
  const Weight& weight;
  int64_t column;
  int columns;
  int64_t index = -1;
  int32_t zeros[kPanelColumns] = {};
  float scales[kPanelColumns] = {};

  // Those of row k, unless they are there: whether they were loaded.
  bool load(int64_t k) {
    const int64_t group = Spans::grouped(weight) ? k / weight.group_size : weight.g_idx()[k];
    if (group == index) return false;
    index = group;
    scalar::load_zeros(weight, group, column, columns, zeros);
    scalar::load_scales(weight, group, column, columns, scales);
    return true;
  }

  double weight_of(int32_t q, int n) const { return static_cast<double>(scales[n]) * (q - zeros[n]); }
};

}  // namespace

ExactRow::ExactRow(const void* values, DType dtype, const int32_t* perm, int64_t count)
    : values_(values), dtype_(dtype), perm_(perm) {
  const uint32_t largest = largest_bits(values, dtype, count);
  has_nan_ = largest > infinity_of(dtype);
  has_inf_ = largest == infinity_of(dtype);
}

bool ExactRow::counts(float value, bool scale_is_finite) const {
  return !has_inf_ || !std::isfinite(value) || !scale_is_finite;
}

void ExactRow::multiply(const Weight& weight, int64_t column, int columns, const float* sums, void* out) const {
  int first = 0;
  while (first < columns && std::isfinite(sums[first])) ++first;
  while (columns > first && std::isfinite(sums[columns - 1])) --columns;
  if (has_nan_ || first == columns) return;  // where x has NaN, all sums are NaN
  Group group{weight, column + first, columns - first};
  bool scales_are_finite = true;
  double exact[kPanelColumns] = {};
  for (int64_t k = 0; k < weight.K; ++k) {
    if (group.load(k)) {
      scales_are_finite =
          std::all_of(group.scales, group.scales + group.columns, [](float scale) { return std::isfinite(scale); });
    }
    const int64_t from = perm_ ? perm_[k] : k;
    if (from < 0) continue;
    const float x = load_float(values_, dtype_, from);
    if (!counts(x, scales_are_finite)) continue;
    int32_t q[kPanelColumns];
    unpack_row(weight.qweight, weight.N, weight.bits, weight.shuffled, k, group.column, group.columns, q);
    for (int n = 0; n < group.columns; ++n) exact[n] += x * group.weight_of(q[n], n);
    // Looked at now and then, since sums of infinite terms are soon NaN, and stay so.
    if (k % 16 == 0 && std::all_of(exact, exact + group.columns, [](double sum) { return std::isnan(sum); })) break;
  }
  for (int n = first; n < columns; ++n) {
    if (!std::isfinite(sums[n])) store_float(static_cast<float>(exact[n - first]), out, dtype_, n);
  }
}

void ExactRow::multiply_transposed(const Weight& weight, int64_t row, int rows, const float* sums, void* dx) const {
  if (has_nan_) return;  // all sums are NaN
  double exact[kPanelColumns] = {};
  for (int64_t column = 0; column < weight.N; column += kPanelColumns) {
    Group group{weight, column, static_cast<int>(std::min<int64_t>(kPanelColumns, weight.N - column))};
    float grad[kPanelColumns];
    scalar::load(values_, dtype_, nullptr, column, group.columns, grad);
    int first = 0, end = 0;  // from the first to the last column that counts
    for (int i = 0; i < rows; ++i) {
      if (std::isfinite(sums[i]) || std::isnan(exact[i])) continue;
      if (group.load(row + i)) {
        first = 0;
        end = group.columns;
        while (first < end && !counts(grad[first], std::isfinite(group.scales[first]))) ++first;
        while (end > first && !counts(grad[end - 1], std::isfinite(group.scales[end - 1]))) --end;
      }
      int32_t q[kPanelColumns];
      unpack_row(weight.qweight, weight.N, weight.bits, weight.shuffled, row + i, column + first, end - first, q);
      for (int n = first; n < end; ++n) exact[i] += grad[n] * group.weight_of(q[n - first], n);
    }
  }
  for (int i = 0; i < rows; ++i) {
    if (std::isfinite(sums[i])) continue;
    const int64_t k = weight.perm() ? weight.perm()[row + i] : row + i;
    if (k >= 0) store_float(static_cast<float>(exact[i]), dx, dtype_, k);
  }
}

}  // namespace exllama::cpu
