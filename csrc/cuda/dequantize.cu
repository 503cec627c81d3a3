#include "dequantize.cuh"
#include "launch.h"

namespace exllama::cuda {

void dequantize(const Weight& weight, int64_t first_column, int64_t columns, void* out, DType out_dtype,
                Stream stream) {
  const int64_t threads = weight.K / layout::block_values(weight.bits) * columns;
  if (threads == 0) return;
  if (weight.perm()) {
    fill_with_nan(out, weight.K * columns * bytes_of(out_dtype), stream, "dequantize");
  }
  const unsigned grid = grid_of(divide_up(threads, kDequantizeThreads), "dequantize");
  with_bits(weight.bits, [&](auto bits) {
    with_flag(weight.shuffled, [&](auto shuffled) {
      dequantize_columns<bits(), shuffled()>
          <<<grid, kDequantizeThreads, 0, to_cuda(stream)>>>(weight, first_column, columns, out, out_dtype);
    });
  });
  check(cudaGetLastError(), "dequantize");
}

}  // namespace exllama::cuda
