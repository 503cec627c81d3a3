#include "gemm_kernels.h"
#include "gemm_mma.cuh"
#include "mma_launch.h"
#include "overlap.h"

namespace exllama::cuda {

void launch_gemm_mma(const GemmArguments& a, const Config& config, Stream stream) {
  with_bits(a.parts->bits, [&](auto bits) {
    with_half_dtype(a.dtype, [&](auto dtype) {
      with_octets<kMmaOctets>(config.rows, "gemm_mma", [&](auto octets) {
        with_unit(mma_unit_k(a.parts->K, a.parts->group_size), [&](auto unit_k) {
          using T = typename decltype(dtype)::type;
          const Parts parts = parts_of(a, kMmaColumns);
          const int64_t tiles = parts.column_tiles * row_tiles(a, kOctet * octets);
          const dim3 grid(grid_of(tiles, "gemm_mma"), static_cast<unsigned>(config.split_k));
          launch_waiting(gemm_mma<bits(), T, octets(), unit_k()>, grid, kMmaThreads, stream, "gemm_mma", parts,
                         static_cast<const T*>(a.x), a.M, cut_of(*a.parts, config), a.splits, static_cast<T*>(a.out));
        });
      });
    });
  });
}

}  // namespace exllama::cuda
