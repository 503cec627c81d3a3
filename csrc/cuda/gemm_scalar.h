// gemm_scalar: the sizes of its pieces, and what select_gemm asks of it.
#pragma once

#include "cost.h"

namespace exllama::cuda {

// A warp has 128 columns, and the warps of a thread block share the rows of W of a stage.
inline constexpr int kScalarWarps = 4;
inline constexpr int kScalarThreads = 32 * kScalarWarps;
inline constexpr int kScalarColumns = 128;
inline constexpr int kScalarWarpK = 64;                            // rows of W that a warp has of a stage
inline constexpr int kScalarStageK = kScalarWarps * kScalarWarpK;  // for which x lies in shared memory at a time
inline constexpr int kScalarRows[] = {1, 2, 4, 8};                 // of x, for which a word is read once

// Thread blocks that an SM shall have registers for.
EXLLAMA_HOST_DEVICE constexpr int scalar_thread_blocks_per_sm(int64_t rows) { return rows <= 2 ? 4 : 3; }

struct GemmScalar {
  static constexpr Algorithm kAlgorithm = Algorithm::kScalar;
  static constexpr const char* kName = "scalar";

  static constexpr bool can(const Problem&) { return true; }

  // The config for so many rows of x at a time, and up to so many splits of K.
  static constexpr Config config_of(const Problem& p, int rows, int splits) {
    return cost::split({kAlgorithm, rows, 1, 0, 0}, p, kScalarStageK, kScalarColumns, 1, splits);
  }
  static constexpr Config config(const Problem& p) { return cost::fastest<GemmScalar>(p, kScalarRows); }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are those of a warp's rows and of their groups, the warps, and the splits.
  static constexpr int64_t additions(int64_t K, int64_t groups) {
    const int64_t stages = cost::divide_up(K, kScalarStageK);
    return kScalarWarpK * stages + groups + kScalarWarps + stages;
  }

  // Instructions for a weight, by benchmarks/results/cuda-device-code.md. A row costs an FFMA and its share of a load
  // of x. A weight costs a LOP3, a subtraction and its share of shifts, loads and ends of groups. Where any row may
  // begin a group, it costs what that loop needs.
  static constexpr double instructions(const Problem& p, int64_t rows) {
    return (by_row(p) ? 24 : p.bits == 3 ? 2.6 : 2.4) + 1.1 * static_cast<double>(rows);
  }

  static constexpr bool by_row(const Problem& p) {
    return p.raw_g_idx || p.group_size % layout::block_values(p.bits) != 0 || !p.aligned;
  }

  // Bytes of words that a lane loads before it needs the first: of one block of words, or of four words and more.
  static constexpr int lane_loads(const Problem& p) {
    const int words = layout::block_words(p.bits);
    return 16 * (by_row(p) || words > 4 ? words : 4 / words * words);
  }

  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    const cost::Rates rates = cost::rates_of(p.device.arch);
    const double weight_cycles =
        cost::larger(instructions(p, config.rows) / rates.issues, static_cast<double>(1 + config.rows) / rates.floats);
    const double block_loads = kScalarThreads * lane_loads(p);
    return cost::kernel_estimate(
        p, config, {kScalarColumns, weight_cycles, block_loads, scalar_thread_blocks_per_sm(config.rows)});
  }
};

}  // namespace exllama::cuda
