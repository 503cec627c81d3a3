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

}  // namespace

void gather_x(const Weight& filled, const void* x, DType dtype, int64_t M, void* out, Stream stream) {
  const int64_t elements = M * filled.K;
  const unsigned grid = grid_of(divide_up(elements, kGatherThreads), "gather_x");
  with_integers(dtype, [&](auto integer) {
    using T = decltype(integer);
    gather_columns<T, true><<<grid, kGatherThreads, 0, to_cuda(stream)>>>(
        static_cast<const T*>(x), filled.in_features, filled.row_order, filled.K, elements, static_cast<T*>(out));
  });
  check(cudaGetLastError(), "gather_x");
}

void gather_dx(const Weight& filled, const void* dx, DType dtype, int64_t M, void* out, Stream stream) {
  const int64_t elements = M * filled.in_features;
  const unsigned grid = grid_of(divide_up(elements, kGatherThreads), "gather_dx");
  with_integers(dtype, [&](auto integer) {
    using T = decltype(integer);
    gather_columns<T, false>
        <<<grid, kGatherThreads, 0, to_cuda(stream)>>>(static_cast<const T*>(dx), filled.K, filled.row_order + filled.K,
                                                       filled.in_features, elements, static_cast<T*>(out));
  });
  check(cudaGetLastError(), "gather_dx");
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
