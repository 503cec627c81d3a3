// What the host code of the kernels shares: run-time arguments as template arguments, and launches that are checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../layout/dispatch.h"
#include "cuda.h"

namespace exllama::cuda {

using layout::with_bits;

// f(true or false as a constant).
template <typename F>
void with_flag(bool flag, const F& f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("exllama_ops: ") + what + ": " + cudaGetErrorString(error));
}

// As many blocks as work needs, which must be a grid's x.
inline unsigned grid_of(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("exllama_ops: ") + kernel + ": too many thread blocks");
  return static_cast<unsigned>(blocks);
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

// Before a kernel that writes to the rows of a permutation: where a list names none, old memory must not be a result. The
// bytes are NaN in every float dtype, and -1, which is no index.
inline void fill_with_nan(void* out, int64_t bytes, Stream stream, const char* what) {
  check(cudaMemsetAsync(out, 0xff, static_cast<size_t>(bytes), to_cuda(stream)), what);
}

}  // namespace exllama::cuda
