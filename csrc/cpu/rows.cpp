#include "cpu/rows.h"

#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {

void unpack_row(const uint32_t* qweight, int64_t N, int bits, bool shuffled, int64_t k, int64_t column, int columns,
                int32_t* out) {
  const layout::Format& format = layout::format_of(bits);
  const int64_t block = k / format.block_values;
  const layout::Place& place = format.place_of(k % format.block_values, shuffled);
  const uint32_t* words = qweight + block * format.block_words * N + column;
  // Field by field, so that the compiler makes vectors of columns.
  for (int i = 0; i < place.count; ++i) {
    const layout::Field field = place.fields[i];
    const uint32_t* row = words + field.word * N;
    for (int n = 0; n < columns; ++n) {
      const int32_t part = static_cast<int32_t>(field.get(row[n]));
      out[n] = i == 0 ? part : out[n] | part;
    }
  }
}

void unpack_scaled(const Kernels& isa, const Weight& weight, int64_t row, int rows, int64_t group, int64_t column,
                   int columns, float* panel) {
  int32_t zeros[kPanelColumns] = {};
  float scales[kPanelColumns];
  if (Spans::grouped(weight)) {
    isa.load_zeros(weight, group, column, columns, zeros);
    isa.load_scales(weight, group, column, columns, scales);
    isa.unpack_float(weight, row, rows, column, columns, zeros, scales, panel);
    return;
  }
  isa.unpack_float(weight, row, rows, column, columns, zeros, nullptr, panel);
  int32_t loaded = -1;
  for (int i = 0; i < rows; ++i, panel += kPanelColumns) {
    const int32_t own = weight.g_idx()[row + i];
    if (own != loaded) {
      isa.load_zeros(weight, own, column, columns, zeros);
      isa.load_scales(weight, own, column, columns, scales);
      loaded = own;
    }
    for (int n = 0; n < columns; ++n) panel[n] = (panel[n] - static_cast<float>(zeros[n])) * scales[n];
  }
}

}  // namespace exllama::cpu
