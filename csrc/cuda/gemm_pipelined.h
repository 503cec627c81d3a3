// What select_gemm asks of gemm_pipelined.
#pragma once

#include "cost.h"
#include "gemm_mma.h"
#include "pipeline_shape.h"

namespace exllama::cuda {

struct GemmPipelined {
  static constexpr Algorithm kAlgorithm = Algorithm::kPipelined;
  static constexpr const char* kName = "pipelined";

  // Copies that pass by no register are there from sm_80 on. They bring eight columns of x as they lie in memory, which
  // the slices of 3 bits in groups of 32 do not take. In batch-invariant mode a row would meet another order of sums than
  // in gemm_mma, which is better at few rows.
  static constexpr bool can(const Problem& p) {
    const bool in_slices = p.bits == 3 && mma_unit_k(p.K, p.group_size) < kMmaRunK;
    return GemmMma::can(p) && p.device.arch >= 80 && !in_slices && !p.batch_invariant;
  }

  // The config for tiles of so many octets, and up to so many splits of K, which have two runs at least.
  static constexpr Config config_of(const Problem& p, int octets, int splits) {
    return cost::split({kAlgorithm, kOctet * octets, 1, 0, 0}, p, kMmaRunK, kPipelineColumns, 2, splits);
  }
  static constexpr Config config(const Problem& p) { return cost::fastest<GemmPipelined>(p, kPipelineOctets); }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are those of its unit, of the units of its split, and of the splits.
  static constexpr int64_t additions(int64_t K, int64_t) {
    return kMmaRunK + cost::divide_up(K, kMmaMinUnitK) + cost::divide_up(K, 2 * kMmaRunK);
  }

  // Instructions for a weight, by benchmarks/results/cuda-device-code.md: with the copies of a stage.
  static constexpr double instructions(const Problem& p, int64_t rows) {
    const bool wide = p.x_dtype == DType::kBFloat16 && p.bits == 8;
    const double octets = static_cast<double>(rows) / kOctet, copies = p.bits == 8 ? 0.8 : 0;
    if (mma_unit_k(p.K, p.group_size) == kMmaRunK) return (wide ? 3.9 : 2.5) + copies + 0.27 * octets;
    return (wide ? 4.2 : 2.9) + copies + 0.48 * octets;
  }

  // Bytes of words that a thread block has under way while it multiplies a stage.
  static constexpr int block_loads(const Problem& p, int octets) {
    const int stages = pipeline_stages(p.bits, octets, mma_unit_k(p.K, p.group_size));
    return (stages - 1) * kPipelineColumns * pipeline_stage_k(p.bits) * p.bits / 8;
  }

  // The longer of unpacking and multiplying hides half of the other: an SM has two warps or three for each scheduler. A
  // thread block alone on its SM has one, which waits for barriers and for the ends of units.
  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    using namespace cost;
    const Rates rates = rates_of(p.device.arch);
    const double issue = instructions(p, config.rows) / rates.issues;
    const double tensor = static_cast<double>(config.rows) / rates.mma;
    const int64_t blocks = row_tiles(p, config.rows) * divide_up(p.N, kPipelineColumns) * config.split_k;
    const double alone = blocks <= p.device.sm_count ? kAlone : 1;
    const auto octets = static_cast<int>(config.rows / kOctet);
    const KernelShape shape{kPipelineColumns, alone * (larger(issue, tensor) + smaller(issue, tensor) / 2),
                            static_cast<double>(block_loads(p, octets)), pipeline_thread_blocks_per_sm(octets)};
    return kernel_estimate(p, config, shape);
  }

  static constexpr double kAlone = 1.3;
};

}  // namespace exllama::cuda
