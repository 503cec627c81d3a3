// What select_gemm asks of gemm_mma.
#pragma once

#include "cost.h"
#include "mma_shape.h"

namespace exllama::cuda {

struct GemmMma {
  static constexpr Algorithm kAlgorithm = Algorithm::kMma;
  static constexpr const char* kName = "mma";

  // The tensor cores take float16 from sm_75 on and bfloat16 from sm_80 on.
  static constexpr bool has_tensor_cores_for(DType dtype, int32_t arch) {
    return (dtype == DType::kFloat16 && arch >= 75) || (dtype == DType::kBFloat16 && arch >= 80);
  }

  // A unit lies in one group. The kernel numbers groups by a multiplication that is exact below 2**30.
  static constexpr bool groups_fill_units(const Problem& p) {
    const int64_t unit_k = mma_unit_k(p.K, p.group_size), units = cost::divide_up(p.K, unit_k);
    const int64_t units_in_group = cost::at_most(cost::divide_up(p.group_size, unit_k), units);
    return (p.group_size % unit_k == 0 || p.group_size >= p.K) && units * units_in_group < (1 << 30);
  }

  // The kernel multiplies rows by the bytes between them in 32 bits. The limit of M is an x of 64 GiB or more, so
  // batch-invariant mode may look at it.
  static constexpr bool can(const Problem& p) {
    return has_tensor_cores_for(p.x_dtype, p.device.arch) && p.shuffled && p.aligned && groups_fill_units(p) &&
           p.M < (1 << 30) && p.K < (1 << 29) && p.N < (1 << 29);
  }

  // The config for tiles of so many octets, and up to so many splits of K.
  static constexpr Config config_of(const Problem& p, int octets, int splits) {
    return cost::split({kAlgorithm, kOctet * octets, 1, 0, 0}, p, kMmaRunK, kMmaColumns, 2 * kMmaWarpsK, splits);
  }
  static constexpr Config config(const Problem& p) { return cost::fastest<GemmMma>(p, kMmaOctets); }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are those of a warp's runs and of their groups, the warps, and the splits, which have two runs at least.
  static constexpr int64_t additions(int64_t K, int64_t groups) {
    return kMmaRunK * cost::divide_up(K, kMmaWarpsK * kMmaRunK) + groups + kMmaWarpsK +
           cost::divide_up(K, 2 * kMmaRunK);
  }

  // Instructions for a weight, by benchmarks/results/cuda-device-code.md. An octet costs its tensor-core instructions
  // and loads of x. 8 bits are too many for a bfloat16 with an offset.
  static constexpr double instructions(const Problem& p, int64_t rows) {
    const bool wide = p.x_dtype == DType::kBFloat16 && p.bits == 8;
    const double octets = static_cast<double>(rows) / kOctet;
    if (mma_unit_k(p.K, p.group_size) == kMmaRunK) return (wide ? 2.9 : 1.5) + 0.25 * octets;
    return (wide ? 3.0 : p.bits == 3 ? 2.6 : 1.7) + 0.4 * octets;
  }

  // Bytes of words that a thread block loads ahead: each of its warps has 32 columns of some steps.
  static constexpr int block_loads(const Problem& p, int octets) {
    const int unit_k = mma_unit_k(p.K, p.group_size), step_rows = mma_step_k(p.bits, unit_k) * p.bits / 32;
    return mma_steps_ahead(p.bits, unit_k, octets) * step_rows * 128 * kMmaWarpsN * kMmaWarpsK;
  }

  // A warp has unpacked what it multiplies, and an SM has too few warps for one to hide the other.
  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    const cost::Rates rates = cost::rates_of(p.device.arch);
    const double weight_cycles =
        instructions(p, config.rows) / rates.issues + static_cast<double>(config.rows) / rates.mma;
    const auto octets = static_cast<int>(config.rows / kOctet);
    const auto loads = static_cast<double>(block_loads(p, octets));
    return cost::kernel_estimate(p, config,
                                 {kMmaColumns, weight_cycles, loads, mma_thread_blocks_per_sm(p.bits, octets)});
  }
};

}  // namespace exllama::cuda
