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

inline constexpr Algorithm kAlgorithms[] = {Algorithm::kMma, Algorithm::kScalar, Algorithm::kTiled, Algorithm::kDense};

struct Config {
  Algorithm algorithm;
  int64_t rows;     // of x, for which a word is read once: of kScalarRows or kMmaRows; kDense: of one matmul
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

// So many tokens that M decides, in batch-invariant mode too, are an x of 64 GiB or more.
constexpr bool mma_can(const Problem& p) {
  return has_tensor_cores_for(p.x_dtype, p.device.arch) && p.shuffled && p.aligned && groups_fill_mma_units(p) &&
         p.M < (1 << 30) && p.K < (1 << 29) && p.N < (1 << 29);
}

// A row's sum must not depend on M: the tiles of gemm_tiled and of a BLAS are chosen by M. torch's matmul of float32 may
// run in TF32, as its user set it; the product is promised in float32.
constexpr bool tiled_can(const Problem& p) { return !p.batch_invariant; }
constexpr bool dense_can(const Problem& p) { return !p.batch_invariant && p.x_dtype != DType::kFloat32; }

// The cost model: clock cycles from the first thread block to the last, to rank by. It rests on data sheets and on the
// instructions in the compiled loops; no GPU has been timed.

// What an SM has in a clock cycle, from this compute capability on. benchmarks/device_code.py has the data sheets.
struct Rates {
  int32_t arch;
  double dram_bytes;
  double issues;  // instructions of a lane: four schedulers of 32 lanes (sm_60: two)
  double floats;  // multiply-adds and sums of float32
  double mma;     // multiply-adds of 16 bits with float32 sums, by mma.sync. GeForce has half the rate of workstation cards
  double blas;    // the same by a BLAS, with the instructions of its chip
};
inline constexpr Rates kRates[] = {
    {60, 8.8, 64, 64, 0, 64},         // P100
    {61, 7.5, 128, 128, 0, 128},      // P40
    {70, 7.4, 128, 64, 0, 512},       // V100
    {75, 5.0, 128, 64, 512, 512},     // T4
    {80, 13.4, 128, 64, 1024, 1024},  // A100 80 GB
    {86, 6.7, 128, 128, 256, 256},    // RTX 3090
    {89, 3.1, 128, 128, 256, 256},    // RTX 4090
    {90, 13.9, 128, 128, 1024, 2048}, // H100
    {100, 29.2, 128, 128, 1024, 4096},  // B200
    {120, 4.4, 128, 128, 256, 256},   // RTX 5090
};
constexpr Rates rates_of(int32_t arch) {
  Rates rates = kRates[0];
  for (const Rates& of_arch : kRates) rates = of_arch.arch <= arch ? of_arch : rates;
  return rates;
}
// Of L2, by an SM: half of what its port could take.
inline constexpr double kL2BytesPerCycle = 32;
// Of a kernel, from the end of the one before it: some two microseconds.
inline constexpr double kLaunchCycles = 4000;

// Cycles of the slowest resource, since they overlap, and a tenth of the others', since they do so imperfectly. The
// memories are the whole device's; an SM without a thread block computes nothing and asks for nothing.
constexpr double overlapped(const Problem& p, int64_t blocks, double dram_bytes, double l2_bytes, double sm_cycles) {
  const auto sms = static_cast<double>(p.device.sm_count);
  const double busy = larger(1, blocks < p.device.sm_count ? static_cast<double>(blocks) : sms);
  const double dram = dram_bytes / (rates_of(p.device.arch).dram_bytes * sms);
  const double l2 = l2_bytes / (kL2BytesPerCycle * busy), compute = sm_cycles / busy;
  return 0.9 * larger(larger(dram, l2), compute) + 0.1 * (dram + l2 + compute);
}

constexpr double weights_of(const Problem& p) { return static_cast<double>(p.K) * static_cast<double>(p.N); }
constexpr double weight_bytes(const Problem& p) {
  const double groups = static_cast<double>(p.K) / static_cast<double>(p.group_size);
  return weights_of(p) * p.bits / 8 + groups * static_cast<double>(p.N) * (2 + p.bits / 8.0);
}
constexpr double x_element_bytes(const Problem& p) { return p.x_dtype == DType::kFloat32 ? 4 : 2; }

// Instructions a weight, by benchmarks/results/cuda-device-code.md: with rows of x, and of them alone.

// A row costs an FFMA and its share of a load of x; a weight a LOP3, a subtraction and its share of shifts, loads and ends
// of groups, or what gemm_scalar needs where any row may begin a group.
constexpr double scalar_instructions(const Problem& p, int64_t rows) {
  const bool by_row = p.raw_g_idx || p.group_size % layout::block_values(p.bits) != 0 || !p.aligned;
  return (by_row ? 24 : p.bits == 3 ? 2.6 : 2.4) + 1.1 * static_cast<double>(rows);
}

// A tile costs its tensor-core instructions and loads of x. 8 bits are too many for a bfloat16 with an offset.
constexpr double mma_instructions(const Problem& p, int64_t rows) {
  const bool wide = p.x_dtype == DType::kBFloat16 && p.bits == 8;
  const double tiles = static_cast<double>(rows) / kMmaTokens;
  if (mma_unit_k(p.K, p.group_size) == kMmaRunK) return (wide ? 2.9 : 1.5) + 0.25 * tiles;
  return (wide ? 3.0 : p.bits == 3 ? 2.6 : 1.7) + 0.4 * tiles;
}

// And of dequantize, whose threads have a block of words each.
constexpr double dequantize_instructions(int32_t bits) { return 15 + 120.0 / layout::block_values(bits); }

// Cycles of an SM for a weight and `rows` rows of x.
constexpr double scalar_weight_cycles(const Problem& p, int64_t rows) {
  const Rates rates = rates_of(p.device.arch);
  return larger(scalar_instructions(p, rows) / rates.issues, static_cast<double>(1 + rows) / rates.floats);
}
// What a warp multiplies, it has unpacked before, and an SM has too few warps for one to hide the other.
constexpr double mma_weight_cycles(const Problem& p, int64_t rows) {
  const Rates rates = rates_of(p.device.arch);
  return mma_instructions(p, rows) / rates.issues + static_cast<double>(rows) / rates.mma;
}
// Two reads of shared memory for 16 multiply-adds, and the tile of W unpacked for every 64 rows.
constexpr double tiled_weight_cycles(const Problem& p) {
  const Rates rates = rates_of(p.device.arch);
  return larger((12 + 1.2 * kTiledRows) / rates.issues, kTiledRows / rates.floats);
}

// A kernel that goes over W once for every config.rows rows of x, by tiles of `columns`. W comes from DRAM once, since
// the thread blocks of a tile of columns follow one another; x comes from L2 for every tile. What splitting K costs, and
// gains by more warps on an SM, is left out.
constexpr double kernel_cycles(const Problem& p, const Config& config, int64_t columns, double weight_cycles) {
  const int64_t passes = divide_up(p.M, config.rows), tiles = divide_up(p.N, columns);
  const auto times = static_cast<double>(passes);
  const double row_bytes = static_cast<double>(p.K) * x_element_bytes(p);
  const double pass_bytes = weight_bytes(p) + row_bytes * static_cast<double>(config.rows * tiles);
  return overlapped(p, passes * tiles * config.split_k, weight_bytes(p) + row_bytes * static_cast<double>(p.M),
                    pass_bytes * times,
                    weights_of(p) * times * weight_cycles) +
         kLaunchCycles;
}

// Chunk by chunk W is dequantized into L2, multiplied, and the float32 result is rounded into place.
constexpr double dense_cycles(const Problem& p, const Config& config) {
  const Rates rates = rates_of(p.device.arch);
  const double weights = weights_of(p), sms = p.device.sm_count;
  const double dequantize = overlapped(p, p.device.sm_count, weight_bytes(p), 2 * weights,
                                       weights * dequantize_instructions(p.bits) / rates.issues);
  const double blas = p.x_dtype == DType::kFloat16 || p.device.arch >= 80 ? rates.blas : rates.floats;
  const double products = weights * static_cast<double>(p.M) / (blas * sms);
  const double rounding = 10 * static_cast<double>(p.M) * static_cast<double>(p.N) / (kL2BytesPerCycle * sms);
  const auto launches = static_cast<double>(divide_up(p.N, config.chunk) * (1 + 2 * divide_up(p.M, config.rows)));
  return dequantize + products + rounding + kLaunchCycles * launches;
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

constexpr double cycles(const Problem& p, const Config& config) {
  using namespace selection;
  switch (config.algorithm) {
    case Algorithm::kScalar:
      return kernel_cycles(p, config, kScalarColumns, scalar_weight_cycles(p, config.rows));
    case Algorithm::kMma:
      return kernel_cycles(p, config, kMmaColumns, mma_weight_cycles(p, config.rows));
    case Algorithm::kTiled:
      return kernel_cycles(p, config, kTiledColumns, tiled_weight_cycles(p));
    case Algorithm::kDense:
      return dense_cycles(p, config);
  }
  return 0;
}

// Each algorithm, as it would compute the problem with so many rows of x. In batch-invariant mode K is split as for one
// tile of rows, whatever M is.
constexpr Config scalar_config(const Problem& p, int64_t rows) {
  using namespace selection;
  Config config{Algorithm::kScalar, rows, 1, 0, 0};
  const int64_t row_tiles = p.batch_invariant ? 1 : divide_up(p.M, rows);
  split(config, at_least(divide_up(p.K, kScalarStageK), 1), kScalarStageK,
        divide_up(p.N, kScalarColumns) * row_tiles, 1, p.device.sm_count);
  return config;
}

constexpr Config mma_config(const Problem& p, int64_t rows) {
  using namespace selection;
  Config config{Algorithm::kMma, rows, 1, 0, 0};
  const int64_t row_tiles = p.batch_invariant ? 1 : divide_up(p.M, rows);
  split(config, at_least(divide_up(p.K, kMmaRunK), 1), kMmaRunK, divide_up(p.N, kMmaColumns) * row_tiles,
        2 * kMmaWarpsK, p.device.sm_count);
  return config;
}

constexpr Config tiled_config(const Problem& p) { return {Algorithm::kTiled, kTiledRows, 1, p.K, 0}; }

// A chunk of W in x's dtype and its float32 result take no more than 64 MiB and half the L2 together, or else the chunk
// has 64 columns. The result is no larger than the chunk, or has no more than 64 rows: x is divided for that.
constexpr Config dense_config(const Problem& p) {
  using namespace selection;
  const int64_t bytes = at_most(int64_t{64} << 20, p.device.l2_bytes / 2);
  const int64_t rows = at_least(at_most(p.M, at_least(p.K / 2, 64)), 1);
  const int64_t columns = bytes / (2 * p.K + 4 * rows) / 64 * 64;
  return {Algorithm::kDense, rows, 1, p.K, at_most(at_least(columns, 64), at_least(p.N, 1))};
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

// The fastest config of an algorithm by the cost model.
constexpr Config config_of(const Problem& p, Algorithm algorithm) {
  Config best{};
  const auto consider = [&](const Config& config) {
    if (best.rows == 0 || cycles(p, config) < cycles(p, best)) best = config;
  };
  switch (algorithm) {
    case Algorithm::kScalar:
      for (const int rows : kScalarRows) consider(scalar_config(p, rows));
      break;
    case Algorithm::kMma:
      for (const int rows : kMmaRows) consider(mma_config(p, rows));
      break;
    case Algorithm::kTiled:
      return tiled_config(p);
    case Algorithm::kDense:
      return dense_config(p);
  }
  return best;
}

// The fastest config of all by the cost model. In batch-invariant mode the choice must not depend on M, nor may it fall
// on another kernel for a larger M: the tensor cores where they can, else the CUDA cores.
constexpr Config select_gemm(const Problem& p) {
  if (p.batch_invariant) return config_of(p, can(p, Algorithm::kMma) ? Algorithm::kMma : Algorithm::kScalar);
  Config best{};
  for (const Algorithm algorithm : kAlgorithms) {
    if (!can(p, algorithm)) continue;
    const Config config = config_of(p, algorithm);
    if (best.rows == 0 || cycles(p, config) < cycles(p, best)) best = config;
  }
  return best;
}

}  // namespace exllama::cuda
