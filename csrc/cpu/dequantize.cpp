// dequantize, and the float panels that gemm and gemm_dx share with it.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "unpack.h"

namespace exllama::cpu {

void unpack_scaled(const Kernels& isa, const Weight& weight, int64_t row, int rows, int64_t group, int64_t column,
                   int columns, float* panel) {
  int32_t zeros[kPanelColumns] = {};
  float scales[kPanelColumns];
  if (Blocks::grouped(weight)) {
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

void dequantize(const Weight& weight, void* out, const Parallel& parallel) {
  const Kernels& isa = kernels();
  const Blocks blocks(weight, kBlockRows);
  const int32_t* perm = weight.perm();
  for_each(parallel, blocks.count(), [&](int64_t task) {
    alignas(64) float panel[kBlockRows * kPanelColumns];
    const Block block = blocks[task];
    for (int64_t column = 0; column < weight.N; column += kPanelColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanelColumns, weight.N - column));
      unpack_scaled(isa, weight, block.row, block.rows, block.group, column, columns, panel);
      for (int i = 0; i < block.rows; ++i) {
        const int64_t row = perm ? perm[block.row + i] : block.row + i;
        isa.store(panel + i * kPanelColumns, columns, offset(out, weight.scales_dtype, row * weight.N + column),
                  weight.scales_dtype);
      }
    }
  });
}

}  // namespace exllama::cpu
