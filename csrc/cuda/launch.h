// What the host code of the kernels shares: run-time values become template arguments, and launches are checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../layout/dispatch.h"
#include "cuda.h"

namespace exllama::cuda {

using layout::bytes_of;
using layout::with_bits;

// Calls f with true or false as a constant.
template <typename F>
void with_flag(bool flag, const F& f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("exllama_ops: ") + what + ": " + cudaGetErrorString(error));
}

// The x of a grid of so many thread blocks, which it must be able to hold.
inline unsigned grid_of(int64_t thread_blocks, const char* kernel) {
  if (thread_blocks > INT32_MAX)
    throw std::runtime_error(std::string("exllama_ops: ") + kernel + ": too many thread blocks");
  return static_cast<unsigned>(thread_blocks);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

// To be called before a kernel that writes to the rows of a permutation. If the permutation does not name a row, its old
// memory must not become a result. The bytes are NaN in every float dtype, and as an index they are -1, which is none.
inline void fill_with_nan(void* out, int64_t bytes, Stream stream, const char* what) {
  check(cudaMemsetAsync(out, 0xff, static_cast<size_t>(bytes), to_cuda(stream)), what);
}

}  // namespace exllama::cuda
