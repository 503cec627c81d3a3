// gemm by the kernel of its config, and the sum of its splits.
#include "gemm_kernels.h"
#include "launch.h"
#include "split_k.cuh"

namespace exllama::cuda {

Problem problem_of(const Weight& weight, DType x_dtype, int64_t M, const Device& device, bool batch_invariant) {
  Problem problem{};
  problem.M = M;
  problem.K = weight.K;
  problem.N = weight.N;
  problem.bits = weight.bits;
  problem.group_size = weight.group_size;
  problem.x_dtype = x_dtype;
  problem.scales_dtype = weight.scales_dtype;
  problem.shuffled = weight.shuffled;
  problem.has_perm = weight.shuffled && weight.rows;
  problem.raw_g_idx = !weight.shuffled && weight.rows;
  const size_t four_scales = weight.scales_dtype == DType::kFloat32 ? 16 : 8;
  problem.aligned = reinterpret_cast<uintptr_t>(weight.qweight) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(weight.scales) % four_scales == 0;
  problem.batch_invariant = batch_invariant;
  problem.device = device;
  return problem;
}

namespace {

// The kernels store rows that follow one another. Sums for other places take the way of those that are split along K;
// few rows have split sums anyway.
bool takes_partials(int64_t M, int64_t N, const Config& config, int64_t out_stride) {
  return config.split_k > 1 || (M > 1 && out_stride != N);
}

}  // namespace

size_t gemm_workspace_bytes(const Problem& problem, const Config& config, int64_t out_stride) {
  if (!takes_partials(problem.M, problem.N, config, out_stride)) return 0;
  return static_cast<size_t>(config.split_k * problem.M * problem.N) * sizeof(float);
}

void gemm(const Weight& weight, const void* x, DType x_dtype, int64_t M, void* out, int64_t out_stride,
          const Config& config, void* workspace, Stream stream) {
  if (M == 0 || weight.N == 0) return;
  const bool split = takes_partials(M, weight.N, config, out_stride);
  float* const partials = split ? static_cast<float*>(workspace) : nullptr;
  const GemmArguments arguments{weight, x, x_dtype, M, out, partials};
  switch (config.algorithm) {
    case Algorithm::kScalar:
      launch_gemm_scalar(arguments, config, stream);
      break;
    case Algorithm::kMma:
      launch_gemm_mma(arguments, config, stream);
      break;
    case Algorithm::kTiled:
      launch_gemm_tiled(arguments, stream);
      break;
    case Algorithm::kDense:
      throw std::logic_error("exllama_ops: gemm: a dense product is its caller's");
  }
  if (!split) return;
  const int64_t elements = M * weight.N;
  add_splits<<<grid_of(divide_up(elements, kSplitThreads), "add_splits"), kSplitThreads, 0, to_cuda(stream)>>>(
      partials, static_cast<int>(config.split_k), elements, weight.N, out, out_stride, x_dtype);
  check(cudaGetLastError(), "add_splits");
}

}  // namespace exllama::cuda
