#include "gemm_kernels.h"
#include "gemm_tiled.cuh"
#include "launch.h"

namespace exllama::cuda {
namespace {

template <bool transposed>
void launch(const Weight& weight, const void* a, DType a_dtype, int64_t M, void* out, DType out_dtype, Stream stream) {
  with_bits(weight.bits, [&](auto bits) {
    with_flag(weight.shuffled, [&](auto shuffled) {
      const int64_t columns = transposed ? weight.K : weight.N;
      const unsigned grid = grid_of(divide_up(columns, kTiledColumns) * divide_up(M, kTiledRows), "gemm_tiled");
      gemm_tiled<bits(), shuffled(), transposed>
          <<<grid, kTiledThreads, 0, to_cuda(stream)>>>(weight, a, a_dtype, M, out, out_dtype);
    });
  });
  check(cudaGetLastError(), "gemm_tiled");
}

}  // namespace

void launch_gemm_tiled(const GemmArguments& a, Stream stream) {
  void* const out = a.partials ? a.partials : a.out;
  launch<false>(a.weight, a.x, a.dtype, a.M, out, a.partials ? DType::kFloat32 : a.dtype, stream);
}

void gemm_dx(const Weight& weight, const void* grad, DType grad_dtype, int64_t M, void* dx, Stream stream) {
  if (M > 0 && weight.K > 0) launch<true>(weight, grad, grad_dtype, M, dx, grad_dtype, stream);
}

}  // namespace exllama::cuda
