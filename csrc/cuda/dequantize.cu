#include <cmath>

#include "dequantize.cuh"
#include "launch.h"
#include "limbs.h"

namespace exllama::cuda {
namespace {

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether dequantize_eights can make it.
bool goes_by_eights(const Weight& weight, const DenseW& to) {
  const int values = layout::block_values(weight.bits);
  const bool one_group = !weight.g_idx() && (weight.group_size % values == 0 || weight.group_size >= weight.K);
  return one_group && to.columns % kDequantizeColumns == 0 && to.first_column % kDequantizeColumns == 0 &&
         is_aligned(weight.qweight, 16) && is_aligned(weight.scales, 4 * bytes_of(weight.scales_dtype)) &&
         is_aligned(to.out, 16);
}

template <bool limbs>
void launch(const Weight& weight, const DenseW& to, Stream stream) {
  const bool by_eights = goes_by_eights(weight, to);
  const int64_t threads =
      to.rows / layout::block_values(weight.bits) * (by_eights ? to.columns / kDequantizeColumns : to.columns);
  if (threads == 0) return;
  const unsigned grid = grid_of(divide_up(threads, kDequantizeThreads), "dequantize");
  with_bits(weight.bits, [&](auto bits) {
    with_flag(weight.shuffled, [&](auto shuffled) {
      if (by_eights) {
        dequantize_eights<bits(), shuffled(), limbs><<<grid, kDequantizeThreads, 0, to_cuda(stream)>>>(weight, to);
      } else {
        dequantize_columns<bits(), shuffled(), limbs><<<grid, kDequantizeThreads, 0, to_cuda(stream)>>>(weight, to);
      }
    });
  });
  check(cudaGetLastError(), "dequantize");
}

}  // namespace

void dequantize(const Weight& weight, int64_t first_column, int64_t columns, void* out, DType out_dtype,
                Stream stream) {
  if (weight.K * columns == 0) return;
  if (weight.perm()) fill_with_nan(out, weight.K * columns * bytes_of(out_dtype), stream, "dequantize");
  launch<false>(weight, {0, weight.K, first_column, columns, out, out_dtype, 1, 1, 1}, stream);
}

void dequantize_limbs(const Weight& weight, int64_t first_row, int64_t rows, void* out, DType out_dtype,
                      Stream stream) {
  const Limbs limbs = limbs_of(out_dtype, weight.scales_dtype, weight.bits);
  launch<true>(weight,
               {first_row, rows, 0, weight.N, out, out_dtype, limbs.count, std::ldexp(1.0f, -limbs.shift),
                std::ldexp(1.0f, limbs.step)},
               stream);
}

}  // namespace exllama::cuda
