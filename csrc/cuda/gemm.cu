// Runs gemm by the kernel of its config, and adds up the splits.
#include <algorithm>

#include "add_splits.cuh"
#include "gather.h"
#include "gemm_kernels.h"
#include "launch.h"

namespace exllama::cuda {

using layout::columns_of;

Problem problem_of(const Weight* parts, int64_t count, const Experts& experts, DType x_dtype, int64_t M,
                   const Device& device, bool batch_invariant) {
  const Weight& first = parts[0];
  Problem problem{};
  problem.M = M;
  problem.K = first.K;
  problem.N = columns_of(parts, count);
  problem.experts = experts.count;
  problem.bits = first.bits;
  problem.group_size = first.group_size;
  problem.x_dtype = x_dtype;
  problem.scales_dtype = first.scales_dtype;
  problem.shuffled = first.shuffled;
  problem.has_perm = first.perm() != nullptr;
  problem.raw_g_idx = first.g_idx() != nullptr;
  problem.aligned = std::all_of(parts, parts + count, [](const Weight& part) {
    const size_t four_scales = part.scales_dtype == DType::kFloat32 ? 16 : 8;
    return reinterpret_cast<uintptr_t>(part.qweight) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(part.scales) % four_scales == 0;
  });
  problem.batch_invariant = batch_invariant;
  problem.device = device;
  return problem;
}

namespace {

// Of x in the order of the words, if it is gathered: whole pieces of what a workspace is aligned to.
int64_t gathered_bytes(bool has_perm, int64_t M, int64_t K, DType x_dtype, const Config& config) {
  return gathers_x(has_perm, M, config) ? divide_up(M * K * bytes_of(x_dtype), 64) * 64 : 0;
}

// Tiles of a product whose K is split, in all its launches.
int64_t tiles_of(const Weight* parts, int64_t count, int64_t experts, int64_t M, const Config& config) {
  const int64_t tile_columns = config.algorithm == Algorithm::kMma         ? kMmaColumns
                               : config.algorithm == Algorithm::kPipelined ? kPipelineColumns
                                                                           : kScalarColumns;
  int64_t tiles = 0;
  for (const Weight* part = parts; part != parts + count; ++part) tiles += divide_up(part->N, tile_columns);
  return tiles * most_row_tiles(M, experts, config.rows);
}

}  // namespace

size_t gemm_workspace_bytes(const Problem& problem, const Config& config) {
  const int64_t partials = config.split_k > 1 ? config.split_k * problem.M * problem.N : 0;
  return static_cast<size_t>(gathered_bytes(problem.has_perm, problem.M, problem.K, problem.x_dtype, config)) +
         static_cast<size_t>(partials) * sizeof(float);
}

Parts parts_of(const GemmArguments& a, int tile_columns) {
  Parts parts{};
  parts.weight = a.parts[0];
  if (a.x_is_gathered) parts.weight.row_order = nullptr;
  parts.columns = a.columns;
  parts.experts = a.experts;
  int64_t tiles = 0, columns_before = a.columns_before;
  for (int64_t i = 0; i < a.count; ++i) {
    const Weight& weight = a.parts[i];
    tiles += divide_up(weight.N, tile_columns);
    parts.part[i] = {weight.qweight,         weight.qzeros, weight.scales, weight.scales_dtype,
                     grid_of(tiles, "gemm"), weight.N,      columns_before};
    columns_before += weight.N;
  }
  parts.column_tiles = grid_of(tiles, "gemm");
  return parts;
}

void gemm(const Weight* parts, int64_t count, const Experts& experts, const void* x, DType x_dtype, int64_t M,
          void* out, const Config& config, void* workspace, Stream stream) {
  const int64_t columns = columns_of(parts, count);
  if (M == 0) return;
  const bool gathers = gathers_x(parts->perm() != nullptr, M, config);
  Splits splits{};
  if (config.split_k > 1) {
    void* const behind_x = static_cast<char*>(workspace) + gathered_bytes(gathers, M, parts->K, x_dtype, config);
    splits.partials = static_cast<float*>(behind_x);
    if (tiles_of(parts, count, experts.count, M, config) <= kTickets) splits.tickets = tickets_for(stream);
  }
  if (gathers) {
    gather_x(*parts, experts, x, x_dtype, M, workspace, stream);
    x = workspace;
  }
  int64_t columns_before = 0;
  for (int64_t first = 0; first < count; first += kMaxParts) {
    const int64_t together = std::min<int64_t>(count - first, kMaxParts);
    const GemmArguments arguments{parts + first, together, columns_before, columns, x, x_dtype, gathers, M,
                                  out,           splits,   experts};
    switch (config.algorithm) {
      case Algorithm::kScalar:
        launch_gemm_scalar(arguments, config, stream);
        break;
      case Algorithm::kMma:
        launch_gemm_mma(arguments, config, stream);
        break;
      case Algorithm::kPipelined:
        launch_gemm_pipelined(arguments, config, stream);
        break;
      case Algorithm::kTiled:
        launch_gemm_tiled(arguments, stream);
        break;
      case Algorithm::kDense:
        throw std::logic_error("exllama_ops: gemm: a dense product is its caller's");
    }
    columns_before += columns_of(parts + first, together);
  }
  if (!splits.partials || splits.tickets) return;
  const int64_t elements = M * columns;
  add_splits<<<grid_of(divide_up(elements, kSplitThreads), "add_splits"), kSplitThreads, 0, to_cuda(stream)>>>(
      splits.partials, static_cast<int>(config.split_k), elements, out, x_dtype);
  check(cudaGetLastError(), "add_splits");
}

}  // namespace exllama::cuda
