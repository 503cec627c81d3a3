#include <algorithm>

#include "gemm_kernels.h"
#include "gemm_mma.cuh"
#include "launch.h"

namespace exllama::cuda {
namespace {

template <typename F>
void with_tiles(int64_t rows, const F& f) {
  switch (rows / kMmaTokens) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
  }
  throw std::logic_error("exllama_ops: gemm_mma: no kernel for " + std::to_string(rows) + " rows");
}

template <typename F>
void with_unit(int unit_k, const F& f) {
  if (unit_k == kMmaRunK) return f(std::integral_constant<int, kMmaRunK>{});
  f(std::integral_constant<int, kMmaMinUnitK>{});
}

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
void with_half_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat16) return f(Type<__half>{});
  f(Type<__nv_bfloat16>{});
}

MmaShape shape_of(const Weight& weight, const Config& config) {
  const int64_t unit = mma_unit_k(weight.K, weight.group_size);
  const int64_t of_group = std::min(divide_up(weight.group_size, unit), divide_up(weight.K, unit));
  return {config.k_per_split / kMmaRunK, static_cast<uint32_t>(divide_up(int64_t{1} << 32, 2 * of_group))};
}

}  // namespace

void launch_gemm_mma(const GemmArguments& a, const Config& config, Stream stream) {
  with_bits(a.parts->bits, [&](auto bits) {
    with_half_dtype(a.dtype, [&](auto dtype) {
      with_tiles(config.rows, [&](auto tiles) {
        with_unit(mma_unit_k(a.parts->K, a.parts->group_size), [&](auto unit_k) {
          using T = typename decltype(dtype)::type;
          const Parts parts = parts_of(a, kMmaColumns);
          const int64_t blocks = parts.column_tiles * divide_up(a.M, kMmaTokens * tiles);
          const dim3 grid(grid_of(blocks, "gemm_mma"), static_cast<unsigned>(config.split_k));
          gemm_mma<bits(), T, tiles(), unit_k()><<<grid, kMmaThreads, 0, to_cuda(stream)>>>(
              parts, static_cast<const T*>(a.x), a.M, shape_of(*a.parts, config), a.partials,
              static_cast<T*>(a.out));
        });
      });
    });
  });
  check(cudaGetLastError(), "gemm_mma");
}

}  // namespace exllama::cuda
