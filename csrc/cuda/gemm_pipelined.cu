#include "gemm_kernels.h"
#include "gemm_pipelined.cuh"
#include "mma_launch.h"

namespace exllama::cuda {

void launch_gemm_pipelined(const GemmArguments& a, const Config& config, Stream stream) {
  with_bits(a.parts->bits, [&](auto bits) {
    with_half_dtype(a.dtype, [&](auto dtype) {
      with_octets<kPipelineOctets>(config.rows, "gemm_pipelined", [&](auto octets) {
        with_unit(mma_unit_k(a.parts->K, a.parts->group_size), [&](auto unit_k) {
          if constexpr (bits() == 3 && unit_k() < kMmaRunK) {
            throw std::logic_error("exllama_ops: gemm_pipelined: no kernel for 3 bits in groups of 32");
          } else {
            using T = typename decltype(dtype)::type;
            const Parts parts = parts_of(a, kPipelineColumns);
            const int64_t tiles = parts.column_tiles * row_tiles(a, kOctet * octets);
            const dim3 grid(grid_of(tiles, "gemm_pipelined"), static_cast<unsigned>(config.split_k));
            gemm_pipelined<bits(), T, octets(), unit_k()><<<grid, kPipelineThreads, 0, to_cuda(stream)>>>(
                parts, static_cast<const T*>(a.x), a.M, cut_of(*a.parts, config), a.splits, static_cast<T*>(a.out));
          }
        });
      });
    });
  });
  check(cudaGetLastError(), "gemm_pipelined");
}

}  // namespace exllama::cuda
