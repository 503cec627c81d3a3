#include "gemm_kernels.h"
#include "gemm_scalar.cuh"
#include "overlap.h"

namespace exllama::cuda {
namespace {

template <typename F>
void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
  }
  throw std::logic_error("exllama_ops: gemm_scalar: no kernel for " + std::to_string(rows) + " rows");
}

}  // namespace

void launch_gemm_scalar(const GemmArguments& a, const Config& config, Stream stream) {
  with_bits(a.parts->bits, [&](auto bits) {
    with_flag(a.parts->shuffled, [&](auto shuffled) {
      with_rows(config.rows, [&](auto rows) {
        const Parts parts = parts_of(a, kScalarColumns);
        const dim3 grid(grid_of(parts.column_tiles * row_tiles(a, rows), "gemm_scalar"),
                        static_cast<unsigned>(config.split_k));
        launch_waiting(gemm_scalar<bits(), shuffled(), rows()>, grid, kScalarThreads, stream, "gemm_scalar", parts, a.x,
                       a.dtype, a.M, config.k_per_split / kScalarStageK, a.splits, a.out);
      });
    });
  });
}

}  // namespace exllama::cuda
