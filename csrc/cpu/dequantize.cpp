// dequantize: span by span, panel by panel.
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/spans.h"

namespace exllama::cpu {

void dequantize(const Weight& weight, void* out, const Parallel& parallel) {
  const Kernels& isa = kernels();
  const Spans spans(weight, kSpanRows);
  const int32_t* perm = weight.perm();
  for_each(parallel, spans.count(), [&](int64_t task) {
    alignas(64) float panel[kSpanRows * kPanelColumns];
    const Span span = spans[task];
    for (int64_t column = 0; column < weight.N; column += kPanelColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanelColumns, weight.N - column));
      unpack_scaled(isa, weight, span.row, span.rows, span.group, column, columns, panel);
      for (int i = 0; i < span.rows; ++i) {
        const int64_t row = perm ? perm[span.row + i] : span.row + i;
        if (row < 0) continue;
        isa.store(panel + i * kPanelColumns, columns, offset(out, weight.scales_dtype, row * weight.N + column),
                  weight.scales_dtype);
      }
    }
  });
}

}  // namespace exllama::cpu
