// The kernels in plain C++: what runs where nothing better is known, and what the vector kernels are compared with.
#include "cpu/isa/scalar/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/isa/isas.h"
#include "cpu/rows.h"
#include "layout/dispatch.h"

namespace exllama::cpu::scalar {

void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    const int64_t from = perm ? perm[begin + i] : begin + i;
    out[i] = from < 0 ? 0.0f : load_float(x, dtype, from);
  }
}

bool store(const float* values, int count, void* out, DType dtype) {
  for (int i = 0; i < count; ++i) store_float(values[i], out, dtype, i);
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, float_bits(values[i]) & 0x7fffffff);
  return largest < 0x7f800000;
}

SpanScale quantize(const void* x, DType dtype, const int32_t* perm, const Span& span, int stride, int limit,
                   int16_t* first, int16_t* second) {
  float values[kSpanRows];
  load(x, dtype, perm, span.row, span.rows, values);
  return quantize_values(values, span.rows, stride, limit, first, second);
}

SpanScale quantize_values(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second) {
  std::memset(first, 0, stride * sizeof *first);
  uint32_t bits = 0;
  for (int i = 0; i < rows; ++i) bits = std::max(bits, float_bits(x[i]) & 0x7fffffff);
  if (bits >= 0x7f800000) return {{0, 0}, {0, 0}, Limbs::kNone};
  if (bits == 0) return {{1, 1}, {0, 0}, Limbs::kOne};

  const int exponent = scale_exponent(bits, limit);
  // 1 / scale in two factors, since 2^149 is no float.
  const float up = power_of_two(std::min(-exponent, 126)), more = power_of_two(std::max(-exponent - 126, 0));
  int32_t largest = 0, sum = 0, sum_abs = 0;
  for (int i = 0; i < rows; ++i) {
    const int32_t q = static_cast<int32_t>(std::lrintf(x[i] * up * more));
    first[i] = static_cast<int16_t>(q);
    largest = std::max(largest, std::abs(q));
    sum += q;
    sum_abs += std::abs(q);
  }
  SpanScale scale{{power_of_two(exponent), 1}, {sum, 0}, Limbs::kOne};
  if (limit != 32767 || !has_outlier(rows, largest, sum_abs)) return scale;

  const int exponent2 = second_exponent(exponent);
  const float finer = power_of_two(exponent - exponent2);
  std::memset(second, 0, stride * sizeof *second);
  bool any = false;
  for (int i = 0; i < rows; ++i) {
    const float rest = x[i] * up * more - static_cast<float>(first[i]);
    second[i] = static_cast<int16_t>(std::lrintf(rest * finer));
    scale.sum[1] += second[i];
    any |= second[i] != 0;
  }
  scale.scale[1] = power_of_two(exponent2);
  if (any) scale.limbs = Limbs::kTwo;
  return scale;
}

void load_zeros(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  // A row of zero points is in checkpoint order along its columns, and its words lie side by side.
  const layout::Format& format = layout::format_of(weight.bits);
  const uint32_t* words = weight.qzeros + group * (weight.N * weight.bits / 32);
  for (int n = 0; n < columns; ++n) {
    const int64_t block = (column + n) / format.block_values, value = (column + n) % format.block_values;
    const uint32_t stored = format.place_of(value, false).read(words + block * format.block_words, 1);
    zeros[n] = static_cast<int32_t>(stored) + weight.zero_offset;
  }
  for (int n = columns; n < kPanelColumns; ++n) zeros[n] = 0;
}

void load_scales(const Weight& weight, int64_t group, int64_t column, int columns, float* scales) {
  load(offset(weight.scales, weight.scales_dtype, group * weight.N), weight.scales_dtype, nullptr, column, columns,
       scales);
  for (int n = columns; n < kPanelColumns; ++n) scales[n] = 0;
}

void unpack_int16(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  int16_t* panel) {
  std::memset(panel, 0, sizeof(int16_t) * kPanelColumns * 2 * ((rows + 1) / 2));
  int32_t q[kPanelColumns];
  for (int i = 0; i < rows; ++i) {
    unpack_row(weight.qweight, weight.N, weight.bits, weight.shuffled, row + i, column, columns, q);
    int16_t* out = panel + i / 2 * 2 * kPanelColumns + i % 2;
    for (int n = 0; n < columns; ++n) out[2 * n] = static_cast<int16_t>(q[n] - zeros[n]);
  }
}

void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  const float* scales, float* panel) {
  int32_t q[kPanelColumns];
  for (int i = 0; i < rows; ++i, panel += kPanelColumns) {
    unpack_row(weight.qweight, weight.N, weight.bits, weight.shuffled, row + i, column, columns, q);
    for (int n = 0; n < columns; ++n) {
      panel[n] = static_cast<float>(q[n] - zeros[n]) * (scales ? scales[n] : 1);
    }
    for (int n = columns; n < kPanelColumns; ++n) panel[n] = 0;
  }
}

void unpack_transposed(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       const float* scales, float* panel) {
  int32_t q[kPanelColumns];
  for (int i = 0; i < rows; ++i) {
    unpack_row(weight.qweight, weight.N, weight.bits, weight.shuffled, row + i, column, columns, q);
    for (int n = 0; n < columns; ++n) panel[n * kPanelColumns + i] = static_cast<float>(q[n] - zeros[n]) * scales[n];
  }
}

void multiply_int16(const Multiply<int16_t, int16_t>& multiply, Ahead&) {
  for (int m = 0; m < multiply.rows; ++m) {
    const int16_t* x = multiply.x + m * multiply.x_stride;
    int32_t dot[kPanelColumns] = {};
    for (int k = 0; k < multiply.depth; ++k) {
      const int16_t* panel = multiply.panel + k / 2 * 2 * kPanelColumns + k % 2;
      for (int n = 0; n < multiply.columns; ++n) dot[n] += x[k] * panel[2 * n];
    }
    const float scale = multiply.x_scales[m].scale[multiply.limb];
    float* acc = multiply.acc + m * kPanelColumns;
    for (int n = 0; n < multiply.columns; ++n) {
      acc[n] = std::fmaf(static_cast<float>(dot[n]) * scale, multiply.scales[n], acc[n]);
    }
  }
}

void multiply_float(const Multiply<float, float>& multiply, Ahead&) {
  for (int m = 0; m < multiply.rows; ++m) {
    const float* x = multiply.x + m * multiply.x_stride;
    float sum[kPanelColumns] = {};
    for (int k = 0; k < multiply.depth; ++k) {
      const float* panel = multiply.panel + k * kPanelColumns;
      for (int n = 0; n < multiply.columns; ++n) sum[n] = std::fmaf(x[k], panel[n], sum[n]);
    }
    float* acc = multiply.acc + m * kPanelColumns;
    for (int n = 0; n < multiply.columns; ++n) acc[n] = std::fmaf(sum[n], multiply.scales[n], acc[n]);
  }
}

void pack_bytes(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out) {
  const int values = layout::block_values(bits);
  for (int k = 0; k < rows; ++k) {
    const int source = k / values * values + quad_order(bits, k % values);
    out[k] = static_cast<uint8_t>((limb[source] >> shift) + offset);
  }
}

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels made;
    made.name = "scalar";
    made.available = [] { return true; };
    made.load = load;
    made.store = store;
    made.quantize = quantize;
    made.pack_bytes = pack_bytes;
    made.load_zeros = load_zeros;
    made.load_scales = load_scales;
    made.unpack_int16 = unpack_int16;
    made.unpack_float = unpack_float;
    made.unpack_transposed = unpack_transposed;
    made.multiply_int16 = multiply_int16;
    made.multiply_float = multiply_float;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu::scalar
