#include "gather.cuh"
#include "launch.h"

namespace exllama::cuda {
namespace {

// Numbers are copied as the integers of their bits.
template <typename F>
void with_integers(DType dtype, const F& f) {
  if (bytes_of(dtype) == 4) return f(uint32_t{});
  f(uint16_t{});
}

// out (rows, columns) = in (rows, limit) by the columns that the index names.
template <bool fills>
void launch_gather(const char* what, DType dtype, const void* in, int64_t limit, const int32_t* index, int64_t columns,
                   int64_t rows, void* out, Stream stream) {
  if (rows * columns == 0) return;
  const int64_t row_blocks = gather_blocks(columns);
  const unsigned grid = grid_of(rows * row_blocks, what);
  with_integers(dtype, [&](auto integer) {
    using T = decltype(integer);
    gather_columns<T, fills><<<grid, kGatherThreads, 0, to_cuda(stream)>>>(
        static_cast<const T*>(in), limit, index, columns, static_cast<uint32_t>(row_blocks), static_cast<T*>(out));
  });
  check(cudaGetLastError(), what);
}

}  // namespace

void gather_x(const Weight& weight, const void* x, DType dtype, int64_t M, void* out, Stream stream) {
  with_flag(weight.in_features < weight.K, [&](auto is_filled) {
    launch_gather<is_filled()>("gather_x", dtype, x, weight.in_features, weight.row_order, weight.K, M, out, stream);
  });
}

void gather_dx(const Weight& filled, const void* dx, DType dtype, int64_t M, void* out, Stream stream) {
  launch_gather<false>("gather_dx", dtype, dx, filled.K, filled.row_order + filled.K, filled.in_features, M, out,
                       stream);
}

void gather_rows_of_w(const Weight& filled, const void* W, void* out, Stream stream) {
  const int64_t elements = filled.in_features * filled.N;
  if (elements == 0) return;
  const unsigned grid = grid_of(divide_up(elements, kGatherThreads), "gather_rows_of_w");
  with_integers(filled.scales_dtype, [&](auto integer) {
    using T = decltype(integer);
    gather_rows<<<grid, kGatherThreads, 0, to_cuda(stream)>>>(
        static_cast<const T*>(W), filled.K, filled.row_order + filled.K, filled.N, elements, static_cast<T*>(out));
  });
  check(cudaGetLastError(), "gather_rows_of_w");
}

}  // namespace exllama::cuda
