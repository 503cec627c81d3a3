#include <algorithm>
#include <iterator>

#include "gemm_kernels.h"
#include "gemm_mma.cuh"
#include "launch.h"

namespace exllama::cuda {
namespace {

// f(octets as a constant of kMmaOctets).
template <std::size_t i = 0, typename F>
void with_octets(int64_t rows, const F& f) {
  constexpr int octets = kMmaOctets[i];
  if (rows == kOctet * octets) return f(std::integral_constant<int, octets>{});
  if constexpr (i + 1 < std::size(kMmaOctets)) {
    with_octets<i + 1>(rows, f);
  } else {
    throw std::logic_error("exllama_ops: gemm_mma: no kernel for " + std::to_string(rows) + " rows");
  }
}

// f(the rows of a unit as a constant).
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

MmaCut cut_of(const Weight& weight, const Config& config) {
  const int64_t unit_k = mma_unit_k(weight.K, weight.group_size);
  const int64_t units_in_group = std::min(divide_up(weight.group_size, unit_k), divide_up(weight.K, unit_k));
  return {config.k_per_split / kMmaRunK, static_cast<uint32_t>(divide_up(int64_t{1} << 32, 2 * units_in_group))};
}

}  // namespace

void launch_gemm_mma(const GemmArguments& a, const Config& config, Stream stream) {
  with_bits(a.parts->bits, [&](auto bits) {
    with_half_dtype(a.dtype, [&](auto dtype) {
      with_octets(config.rows, [&](auto octets) {
        with_unit(mma_unit_k(a.parts->K, a.parts->group_size), [&](auto unit_k) {
          using T = typename decltype(dtype)::type;
          const Parts parts = parts_of(a, kMmaColumns);
          const int64_t tiles = parts.column_tiles * divide_up(a.M, kOctet * octets);
          const dim3 grid(grid_of(tiles, "gemm_mma"), static_cast<unsigned>(config.split_k));
          gemm_mma<bits(), T, octets(), unit_k()><<<grid, kMmaThreads, 0, to_cuda(stream)>>>(
              parts, static_cast<const T*>(a.x), a.M, cut_of(*a.parts, config), a.splits, static_cast<T*>(a.out));
        });
      });
    });
  });
  check(cudaGetLastError(), "gemm_mma");
}

}  // namespace exllama::cuda
