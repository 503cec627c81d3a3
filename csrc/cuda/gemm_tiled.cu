#include "gemm_kernels.h"
#include "gemm_tiled.cuh"
#include "launch.h"

namespace exllama::cuda {
namespace {

template <bool transposed>
void launch(const Parts& parts, const GemmArguments& a, Stream stream) {
  with_bits(parts.weight.bits, [&](auto bits) {
    with_flag(parts.weight.shuffled, [&](auto shuffled) {
      const unsigned grid = grid_of(parts.column_tiles * row_tiles(a, kTiledRows), "gemm_tiled");
      gemm_tiled<bits(), shuffled(), transposed>
          <<<grid, kTiledThreads, 0, to_cuda(stream)>>>(parts, a.x, a.dtype, a.M, a.out);
    });
  });
  check(cudaGetLastError(), "gemm_tiled");
}

}  // namespace

void launch_gemm_tiled(const GemmArguments& a, Stream stream) { launch<false>(parts_of(a, kTiledColumns), a, stream); }

void fill_dx(const Weight& weight, DType dtype, int64_t M, void* dx, Stream stream) {
  if (weight.perm()) fill_with_nan(dx, M * weight.K * bytes_of(dtype), stream, "gemm_dx");
}

void gemm_dx(const Weight& weight, const Experts& experts, const void* grad, DType grad_dtype, int64_t M, void* dx,
             Stream stream) {
  if (M == 0 || weight.K == 0) return;
  fill_dx(weight, grad_dtype, M, dx, stream);
  // The tiles and the results are those of the rows of W.
  const GemmArguments arguments{&weight, 1, 0, weight.K, grad, grad_dtype, false, M, dx, {}, experts};
  Parts parts = parts_of(arguments, kTiledColumns);
  parts.column_tiles = parts.part[0].end_tile = grid_of(divide_up(weight.K, kTiledColumns), "gemm_tiled");
  launch<true>(parts, arguments, stream);
}

}  // namespace exllama::cuda
