// The launches of one gemm kernel each; gemm.cu chooses between them.
#pragma once

#include "cuda.h"

namespace exllama::cuda {

struct GemmArguments {
  const Weight& weight;
  const void* x;
  DType dtype;  // of x and out
  int64_t M;
  void* out;
  float* partials;  // (split_k, M, N) to be added up, or null if sums go to out at once
};

void launch_gemm_scalar(const GemmArguments& arguments, const Config& config, Stream stream);
void launch_gemm_mma(const GemmArguments& arguments, const Config& config, Stream stream);
void launch_gemm_tiled(const GemmArguments& arguments, Stream stream);

}  // namespace exllama::cuda
