// dx = grad @ W^T in float32.
//
// The words have columns in lanes, so a sum over columns is kept as kLanes partial sums per element of dx, which are
// added once at the end. A task is one block of rows of W and one chunk of rows of grad; it walks all columns.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "unpack.h"

namespace exllama::cpu {
namespace {

// Rows of grad that share an unpacked panel: their sums are 2 KiB each, and stay in L2.
constexpr int kGradRows = 64;

// grad in float32 as [panel of columns][row][column].
float* take_grad(Arena& arena, const Weight& weight, int64_t M) {
  return arena.take<float>(ceil_div(weight.N, kPanelColumns) * M * kPanelColumns);
}

}  // namespace

size_t gemm_dx_workspace_bytes(const Weight& weight, int64_t M, DType, int32_t) {
  Arena arena(nullptr);
  take_grad(arena, weight, M);
  return arena.bytes();
}

void gemm_dx(const Weight& weight, const void* grad, DType grad_dtype, int64_t M, void* dx, void* workspace,
             const Parallel& parallel) {
  const Kernels& isa = kernels();
  const int64_t N = weight.N, panels = ceil_div(N, kPanelColumns);
  Arena arena(workspace);
  float* packed = take_grad(arena, weight, M);
  for_each(parallel, M, [&](int64_t m) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPanelColumns;
      const int columns = static_cast<int>(std::min<int64_t>(kPanelColumns, N - column));
      float* out = packed + (panel * M + m) * kPanelColumns;
      isa.load(offset(grad, grad_dtype, m * N), grad_dtype, nullptr, column, columns, out);
      std::fill(out + columns, out + kPanelColumns, 0.0f);
    }
  });

  const Blocks blocks(weight, kDxRows);
  const int64_t chunks = ceil_div(M, kGradRows);
  const int32_t* perm = weight.shuffled ? weight.rows : nullptr;
  for_each(parallel, blocks.count() * chunks, [&](int64_t task) {
    alignas(64) float W[kDxParts * kDxRows * kPanelColumns];
    alignas(64) float sums[kGradRows * kDxRows * kLanes];
    const Block block = blocks[task / chunks];
    const int64_t begin = task % chunks * kGradRows;
    const int rows = static_cast<int>(std::min<int64_t>(kGradRows, M - begin));
    std::fill(sums, sums + rows * kDxRows * kLanes, 0.0f);
    for (int64_t panel = 0; panel < panels; panel += kDxParts) {
      const int parts = static_cast<int>(std::min<int64_t>(kDxParts, panels - panel));
      for (int part = 0; part < parts; ++part) {
        const int64_t column = (panel + part) * kPanelColumns;
        const int columns = static_cast<int>(std::min<int64_t>(kPanelColumns, N - column));
        unpack_scaled(isa, weight, block.row, block.rows, block.group, column, columns,
                      W + part * kDxRows * kPanelColumns);
      }
      isa.multiply_dx(packed + (panel * M + begin) * kPanelColumns, M * kPanelColumns, rows, W, block.rows, parts,
                      sums);
    }
    for (int m = 0; m < rows; ++m) {
      float result[kDxRows];
      isa.sum_lanes(sums + m * kDxRows * kLanes, block.rows, result);
      void* out = offset(dx, grad_dtype, (begin + m) * weight.K);
      if (!perm) {
        isa.store(result, block.rows, offset(out, grad_dtype, block.row), grad_dtype);
      } else {
        for (int i = 0; i < block.rows; ++i) store_float(result[i], out, grad_dtype, perm[block.row + i]);
      }
    }
  });
}

}  // namespace exllama::cpu
