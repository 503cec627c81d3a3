// gemm_tiled: the sizes of its pieces, and what select_gemm asks of it.
#pragma once

#include "cost.h"

namespace exllama::cuda {

// A thread block computes a tile of 64 by 64. 32 terms of its sums lie in shared memory at a time.
inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledRows = 64, kTiledColumns = 64, kTiledTerms = 32;

struct GemmTiled {
  static constexpr Algorithm kAlgorithm = Algorithm::kTiled;
  static constexpr const char* kName = "tiled";

  // In batch-invariant mode a row must not depend on M, by which the choice falls on these tiles.
  static constexpr bool can(const Problem& p) { return !p.batch_invariant; }

  static constexpr Config config(const Problem& p) { return {kAlgorithm, kTiledRows, 1, p.K, 0}; }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are a chain of K. The weight has two roundings.
  static constexpr int64_t additions(int64_t K, int64_t) { return K + 2; }

  // There are two reads of shared memory for 16 multiply-adds, and the tile of W is unpacked for every 64 rows.
  // All loads of a tile of W are waited for before the next.
  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    const cost::Rates rates = cost::rates_of(p.device.arch);
    const double weight_cycles = cost::larger((12 + 1.2 * kTiledRows) / rates.issues, kTiledRows / rates.floats);
    const double tile_bytes = kTiledTerms * kTiledColumns * p.bits / 8.0;
    return cost::kernel_estimate(p, config, {kTiledColumns, weight_cycles, tile_bytes, 3});
  }
};

}  // namespace exllama::cuda
