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

// out (rows, columns) = in (rows, limit) by the columns that the index names, for experts each its own.
template <bool fills>
void launch_gather(const char* what, DType dtype, const void* in, int64_t limit, const int32_t* index, int64_t columns,
                   int64_t rows, const Experts& experts, int64_t expert_entries, void* out, Stream stream) {
  if (rows * columns == 0) return;
  const int64_t row_blocks = gather_blocks(columns);
  const unsigned grid = grid_of(rows * row_blocks, what);
  with_integers(dtype, [&](auto integer) {
    using T = decltype(integer);
    gather_columns<T, fills><<<grid, kGatherThreads, 0, to_cuda(stream)>>>(
        static_cast<const T*>(in), limit, index, columns, static_cast<uint32_t>(row_blocks), experts, expert_entries,
        static_cast<T*>(out));
  });
  check(cudaGetLastError(), what);
}

// The entries of an order, from one expert's to the next: filled ones have the rows of the words and the columns of x.
int64_t order_entries(const Weight& weight) {
  return weight.in_features < weight.K ? weight.K + weight.in_features : weight.K;
}

}  // namespace

void gather_x(const Weight& weight, const Experts& experts, const void* x, DType dtype, int64_t M, void* out,
              Stream stream) {
  with_flag(weight.in_features < weight.K, [&](auto is_filled) {
    launch_gather<is_filled()>("gather_x", dtype, x, weight.in_features, weight.row_order, weight.K, M, experts,
                               order_entries(weight), out, stream);
  });
}

void gather_dx(const Weight& filled, const Experts& experts, const void* dx, DType dtype, int64_t M, void* out,
               Stream stream) {
  launch_gather<false>("gather_dx", dtype, dx, filled.K, filled.row_order + filled.K, filled.in_features, M, experts,
                       order_entries(filled), out, stream);
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
