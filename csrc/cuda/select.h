// Which kernel computes a gemm, and how it is divided: one pure function of the problem, without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout/weight.h"
#include "tiles.h"

namespace exllama::cuda {

using layout::DType;
using layout::Weight;

struct Device {
  int32_t arch;  // 10 * major + minor of its compute capability
  int32_t sm_count;
  int64_t l2_bytes;
};

struct Problem {
  int64_t M, K, N;
  int32_t bits;
  int64_t group_size;
  DType x_dtype;
  DType scales_dtype;
  bool shuffled;
  bool has_perm;
  bool raw_g_idx;
  bool aligned;  // qweight to 16 bytes, scales to four numbers
  bool batch_invariant;
  Device device;
};

enum class Algorithm : int32_t { kScalar, kMma, kTiled, kDense };

// In the order of preference where the cost model sees no difference.
inline constexpr Algorithm kAlgorithms[] = {Algorithm::kMma, Algorithm::kScalar, Algorithm::kTiled, Algorithm::kDense};

struct Config {
  Algorithm algorithm;
  int32_t rows;     // of x, for which a word is read once: kScalar 1 or 8; kMma 8, 16 or 32; else not looked at
  int64_t split_k;  // thread blocks that share the rows of W
  int64_t k_per_split;
  int64_t chunk;  // columns of W that kDense dequantizes at a time
};

constexpr const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kScalar:
      return "scalar";
    case Algorithm::kMma:
      return "mma";
    case Algorithm::kTiled:
      return "tiled";
    case Algorithm::kDense:
      return "dense";
  }
  return "";
}

namespace selection {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr double larger(double a, double b) { return a > b ? a : b; }

// The rules: what an algorithm cannot do.

// The tensor cores take float16 from sm_75 on and bfloat16 from sm_80 on.
constexpr bool has_tensor_cores_for(DType dtype, int32_t arch) {
  return (dtype == DType::kFloat16 && arch >= 75) || (dtype == DType::kBFloat16 && arch >= 80);
}

// A unit of gemm_mma lies in one group. The kernel numbers groups by a multiplication that is exact below 2**30, and
// multiplies rows by the bytes between them in 32 bits.
constexpr bool groups_fill_mma_units(const Problem& p) {
  const int64_t unit = mma_unit_k(p.K, p.group_size), units = divide_up(p.K, unit);
  const int64_t units_of_group = at_most(divide_up(p.group_size, unit), units);
  return (p.group_size % unit == 0 || p.group_size >= p.K) && units * units_of_group < (1 << 30);
}

constexpr bool mma_can(const Problem& p) {
  return has_tensor_cores_for(p.x_dtype, p.device.arch) && p.shuffled && p.aligned && groups_fill_mma_units(p) &&
         p.K < (1 << 29) && p.N < (1 << 29);
}

// A row's sum must not depend on M: the tiles of gemm_tiled and of a BLAS are chosen by M. torch's matmul of float32 may
// run in TF32, as its user set it; the product is promised in float32.
constexpr bool tiled_can(const Problem& p) { return !p.batch_invariant; }
constexpr bool dense_can(const Problem& p) { return !p.batch_invariant && p.x_dtype != DType::kFloat32; }

// The cost model: clock cycles of the whole device, by the slowest of the resources that an algorithm loads. It is a
// model to rank by, from data sheets and from the instructions in the compiled loops; no GPU has been timed.

// Bytes of DRAM per cycle of one SM: P100 and V100 7, T4 5, A100 40 GB 10, RTX 3090 7, RTX 4090 3, H100 14, B200 28,
// RTX 5090 4.
constexpr double dram_bytes_per_cycle(int32_t arch) {
  if (arch < 75) return 7;
  if (arch == 75) return 5;
  if (arch == 80) return 10;
  if (arch < 89) return 7;
  if (arch < 90) return 3;
  if (arch < 100) return 14;
  if (arch < 120) return 28;
  return 4;
}
// Instructions of a lane per cycle of one SM: four schedulers of 32 lanes (sm_60: two).
constexpr double issues_per_cycle(int32_t arch) { return arch == 60 ? 64 : 128; }
// Chips whose SMs have half the tensor cores or fewer: workstation cards reach 512 with float32 sums, GeForce 256.
constexpr bool has_small_tensor_cores(int32_t arch) { return (arch > 80 && arch < 90) || arch >= 120; }
// Multiply-adds and sums of float32 per cycle of one SM, which up to sm_80 has half as many lanes for them; sm_61 has all.
constexpr double float_per_cycle(int32_t arch) { return arch == 61 || arch > 80 ? 128 : 64; }
// Multiply-adds of 16 bits per cycle of one SM: tensor cores by mma.sync, which later chips do not speed up.
constexpr double mma_per_cycle(int32_t arch) { return arch < 80 || has_small_tensor_cores(arch) ? 512 : 1024; }
// The same by a BLAS, with the instructions of its chip; without tensor cores on the CUDA cores.
constexpr double blas_per_cycle(DType dtype, int32_t arch) {
  if (!has_tensor_cores_for(dtype, arch)) return float_per_cycle(arch);
  if (arch < 80 || has_small_tensor_cores(arch)) return 400;
  return arch < 90 ? 800 : 1600;
}

constexpr double weight_bytes(const Problem& p) {
  const double groups = static_cast<double>(p.K) / static_cast<double>(p.group_size);
  return static_cast<double>(p.K) * p.N * p.bits / 8 + groups * p.N * (2 + p.bits / 8.0);
}

// Instructions a weight, by benchmarks/results/cuda-device-code.md: with rows of x, and of them alone.

// A row costs an FFMA and its share of a load of x; a weight a LOP3, a subtraction and its share of shifts, loads and ends
// of groups, or what gemm_scalar needs where any row may begin a group.
constexpr double scalar_instructions(const Problem& p, int32_t rows) {
  const bool by_row = p.raw_g_idx || p.group_size % layout::block_values(p.bits) != 0 || !p.aligned;
  return (by_row ? 24 : p.bits == 3 ? 2.6 : 2.4) + 1.1 * rows;
}

// A tile costs its tensor-core instructions and loads of x. 8 bits are too many for a bfloat16 with an offset.
constexpr double mma_instructions(const Problem& p, int32_t rows) {
  const bool wide = p.x_dtype == DType::kBFloat16 && p.bits == 8;
  const double tiles = static_cast<double>(rows) / kMmaTokens;
  if (mma_unit_k(p.K, p.group_size) == kMmaRunK) return (wide ? 2.9 : 1.5) + 0.2 * tiles;
  return (wide ? 3.0 : p.bits == 3 ? 2.6 : 1.7) + 0.4 * tiles;
}

// A pass over W for `rows` rows of x.
constexpr double scalar_cycles(const Problem& p, int32_t rows) {
  const double passes = static_cast<double>(divide_up(p.M, rows)), weights = static_cast<double>(p.K) * p.N;
  const double issue = weights * scalar_instructions(p, rows) / issues_per_cycle(p.device.arch);
  const double sums = weights * (1 + rows) / float_per_cycle(p.device.arch);
  const double slowest = larger(larger(issue, sums), weight_bytes(p) / dram_bytes_per_cycle(p.device.arch));
  return passes * slowest / p.device.sm_count;
}

constexpr double mma_cycles(const Problem& p, int32_t rows) {
  const double passes = static_cast<double>(divide_up(p.M, rows)), weights = static_cast<double>(p.K) * p.N;
  const double issue = weights * mma_instructions(p, rows) / issues_per_cycle(p.device.arch);
  const double products = weights * rows / mma_per_cycle(p.device.arch);
  const double slowest = larger(larger(issue, products), weight_bytes(p) / dram_bytes_per_cycle(p.device.arch));
  return passes * slowest / p.device.sm_count;
}

// Two reads of shared memory for 16 multiply-adds, and the tile of W unpacked for every 64 rows.
constexpr double tiled_cycles(const Problem& p) {
  const double passes = static_cast<double>(divide_up(p.M, kTiledRows)), weights = static_cast<double>(p.K) * p.N;
  const double issue = weights * (12 + 1.2 * kTiledRows) / issues_per_cycle(p.device.arch);
  const double sums = weights * kTiledRows / float_per_cycle(p.device.arch);
  const double slowest = larger(larger(issue, sums), weight_bytes(p) / dram_bytes_per_cycle(p.device.arch));
  return passes * slowest / p.device.sm_count;
}

// W is written and read once more in two bytes, and a launch and a matmul per chunk take a few microseconds.
constexpr double dense_cycles(const Problem& p, int64_t chunk) {
  const double weights = static_cast<double>(p.K) * p.N;
  const double dequantize = (weight_bytes(p) + 4 * weights) / dram_bytes_per_cycle(p.device.arch);
  const double products = weights * static_cast<double>(p.M) / blas_per_cycle(p.x_dtype, p.device.arch);
  return (dequantize + products) / p.device.sm_count + 12000.0 * static_cast<double>(divide_up(p.N, chunk));
}

// How a K of `units` indivisible parts is split so that `blocks` thread blocks become at least two waves of two on each
// SM, while every split keeps min_units.
constexpr void split(Config& config, int64_t units, int64_t unit_k, int64_t blocks, int64_t min_units, int32_t sms) {
  const int64_t wanted = divide_up(4 * static_cast<int64_t>(sms), at_least(blocks, 1));
  const int64_t possible = at_least(units / min_units, 1);
  const int64_t units_per_split = divide_up(units, at_most(at_most(wanted, possible), 65535));
  config.k_per_split = units_per_split * unit_k;
  config.split_k = divide_up(units, units_per_split);
}

}  // namespace selection

// Each algorithm, as it would compute the problem. In batch-invariant mode K is split as for one row, whatever M is.
constexpr Config scalar_config(const Problem& p) {
  using namespace selection;
  Config config{Algorithm::kScalar, p.M == 1 ? 1 : kScalarMaxRows, 1, 0, 0};
  const int64_t row_tiles = p.batch_invariant ? 1 : divide_up(p.M, config.rows);
  split(config, at_least(divide_up(p.K, kScalarStageK), 1), kScalarStageK,
        divide_up(p.N, kScalarColumns) * row_tiles, 1, p.device.sm_count);
  return config;
}

constexpr Config mma_config(const Problem& p) {
  using namespace selection;
  Config config{Algorithm::kMma, p.M <= 8 ? 8 : p.M <= 16 ? 16 : 32, 1, 0, 0};
  const int64_t row_tiles = p.batch_invariant ? 1 : divide_up(p.M, config.rows);
  split(config, at_least(divide_up(p.K, kMmaRunK), 1), kMmaRunK, divide_up(p.N, kMmaColumns) * row_tiles,
        2 * kMmaWarpsK, p.device.sm_count);
  return config;
}

constexpr Config tiled_config(const Problem& p) { return {Algorithm::kTiled, kTiledRows, 1, p.K, 0}; }

// A chunk of W in x's dtype takes at most 64 MiB and half the L2, and at least 64 columns.
constexpr Config dense_config(const Problem& p) {
  using namespace selection;
  const int64_t bytes = at_most(int64_t{64} << 20, p.device.l2_bytes / 2);
  const int64_t columns = bytes / (2 * at_least(p.K, 1)) / 64 * 64;
  return {Algorithm::kDense, 0, 1, p.K, at_most(at_least(columns, 64), at_least(p.N, 1))};
}

constexpr double cycles(const Problem& p, const Config& config) {
  switch (config.algorithm) {
    case Algorithm::kScalar:
      return selection::scalar_cycles(p, config.rows);
    case Algorithm::kMma:
      return selection::mma_cycles(p, config.rows);
    case Algorithm::kTiled:
      return selection::tiled_cycles(p);
    case Algorithm::kDense:
      return selection::dense_cycles(p, config.chunk);
  }
  return 0;
}

constexpr bool can(const Problem& p, Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kScalar:
      return true;
    case Algorithm::kMma:
      return selection::mma_can(p);
    case Algorithm::kTiled:
      return selection::tiled_can(p);
    case Algorithm::kDense:
      return selection::dense_can(p);
  }
  return false;
}

constexpr Config config_of(const Problem& p, Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kScalar:
      return scalar_config(p);
    case Algorithm::kMma:
      return mma_config(p);
    case Algorithm::kTiled:
      return tiled_config(p);
    case Algorithm::kDense:
      return dense_config(p);
  }
  return {};
}

// The fastest algorithm by the cost model of those that can. In batch-invariant mode the choice must not depend on M,
// nor may it fall on another kernel for a larger M: the tensor cores where they can, else the CUDA cores.
constexpr Config select_gemm(const Problem& p) {
  if (p.batch_invariant) return config_of(p, can(p, Algorithm::kMma) ? Algorithm::kMma : Algorithm::kScalar);
  Config best = scalar_config(p);
  bool chosen = false;
  for (Algorithm algorithm : kAlgorithms) {
    if (!can(p, algorithm)) continue;
    const Config config = config_of(p, algorithm);
    if (!chosen || cycles(p, config) < cycles(p, best)) best = config;
    chosen = true;
  }
  return best;
}

}  // namespace exllama::cuda
