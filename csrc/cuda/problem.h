// A gemm as select_gemm sees it, and what it chooses. Nothing here needs CUDA.
#pragma once

#include <cstdint>

#include "../layout/weight.h"

namespace exllama::cuda {

using layout::DType;
using layout::Weight;

struct Device {
  int32_t arch;  // 10 * major + minor of its compute capability
  int32_t sm_count;
  int64_t l2_bytes;
  int64_t clock_khz;      // the highest of its SMs; 0 if the driver does not tell
  int64_t dram_mb_per_s;  // the nominal rate of its memory; 0 if the driver does not tell
};

struct Problem {
  int64_t M, K, N;
  int64_t experts;  // weights of which each row of x has one; 0: all rows have the same
  int32_t bits;
  int64_t group_size;
  DType x_dtype;
  DType scales_dtype;
  bool shuffled;
  bool has_perm;
  bool raw_g_idx;
  bool aligned;  // qweight to 16 bytes, scales to four numbers
  bool batch_invariant;
  bool fp16_accumulation;  // torch's BLAS may sum float16 in float16, and refuses a float32 result
  bool blas_refused;       // torch refuses its BLAS altogether
  bool blas_rounds_once;   // torch's BLAS makes a result of 16 bits of float32 sums, by one rounding
  int64_t dense_mib;       // scratch memory of kDense in MiB; 0 for its own choice
  Device device;
};

// Each has a struct of this name in a header gemm_*.h, which is a row of the table in select.h.
enum class Algorithm : int32_t { kScalar, kMma, kTiled, kDense, kPipelined };

struct Config {
  Algorithm algorithm;
  int64_t rows;     // of x, for which a word is read once; kDense: of one matmul
  int64_t split_k;  // thread blocks that share the rows of W
  int64_t k_per_split;
  int64_t chunk;  // columns of W that kDense dequantizes at a time, or rows for the gradient
};

}  // namespace exllama::cuda
