// The cost model: clock cycles from the first thread block to the last, to rank by.
//
// It rests on data sheets and on the instructions in the compiled loops. No GPU has been timed.
#pragma once

#include "problem.h"

namespace exllama::cuda::cost {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr double larger(double a, double b) { return a > b ? a : b; }

// What an SM does in a clock cycle, from this compute capability on. benchmarks/gpus.py has the data sheets.
struct Rates {
  int32_t arch;
  double dram_bytes;
  double issues;  // instructions of a lane: four schedulers of 32 lanes (sm_60: two)
  double floats;  // multiply-adds and sums of float32
  double mma;     // multiply-adds of 16 bits with float32 sums, by mma.sync; GeForce has half of a workstation card's
  double blas;    // the same by a BLAS, with the instructions of its chip
};
inline constexpr Rates kRates[] = {
    {60, 8.8, 64, 64, 0, 64},           // P100
    {61, 7.5, 128, 128, 0, 128},        // P40
    {70, 7.4, 128, 64, 0, 512},         // V100
    {75, 5.0, 128, 64, 512, 512},       // T4
    {80, 13.4, 128, 64, 1024, 1024},    // A100 80 GB
    {86, 6.7, 128, 128, 256, 256},      // RTX 3090
    {89, 3.1, 128, 128, 256, 256},      // RTX 4090
    {90, 13.9, 128, 128, 1024, 2048},   // H100
    {100, 29.2, 128, 128, 1024, 4096},  // B200
    {120, 4.4, 128, 128, 256, 256},     // RTX 5090
};

constexpr Rates rates_of(int32_t arch) {
  Rates rates = kRates[0];
  for (const Rates& of_arch : kRates) rates = of_arch.arch <= arch ? of_arch : rates;
  return rates;
}

// Bytes that an SM gets from L2: half of what its port could take.
inline constexpr double kL2BytesPerCycle = 32;
// Cycles between two launches: about 2 us.
inline constexpr double kLaunchCycles = 4000;

// Cycles of the slowest resource, since they overlap, and a tenth of the others', since they do so imperfectly. The
// memories are the whole device's. An SM without a thread block computes nothing and asks for nothing.
constexpr double overlapped(const Problem& p, int64_t thread_blocks, double dram_bytes, double l2_bytes,
                            double sm_cycles) {
  const auto sms = static_cast<double>(p.device.sm_count);
  const double busy = larger(1, thread_blocks < p.device.sm_count ? static_cast<double>(thread_blocks) : sms);
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

// Cycles of a kernel that goes over W once for every config.rows rows of x, by tiles of `columns` columns. W comes from
// DRAM once, since the thread blocks of a tile of columns follow one another. x comes from L2 for every tile. What
// splitting K costs, and gains by more warps on an SM, is left out.
constexpr double kernel_cycles(const Problem& p, const Config& config, int64_t columns, double weight_cycles) {
  const int64_t passes = divide_up(p.M, config.rows), tiles = divide_up(p.N, columns);
  const auto times = static_cast<double>(passes);
  const double row_bytes = static_cast<double>(p.K) * x_element_bytes(p);
  const double pass_bytes = weight_bytes(p) + row_bytes * static_cast<double>(config.rows * tiles);
  return overlapped(p, passes * tiles * config.split_k, weight_bytes(p) + row_bytes * static_cast<double>(p.M),
                    pass_bytes * times, weights_of(p) * times * weight_cycles) +
         kLaunchCycles;
}

// Splits a K of `pieces` indivisible pieces, so that the tiles become at least two waves of two thread blocks on each SM,
// while every split keeps min_pieces. In batch-invariant mode K is split as for one tile of rows, whatever M is.
constexpr Config split(Config config, const Problem& p, int64_t piece_k, int64_t tile_columns, int64_t min_pieces) {
  const int64_t row_tiles = p.batch_invariant ? 1 : divide_up(p.M, config.rows);
  const int64_t tiles = divide_up(p.N, tile_columns) * row_tiles, pieces = at_least(divide_up(p.K, piece_k), 1);
  const int64_t wanted = divide_up(4 * static_cast<int64_t>(p.device.sm_count), at_least(tiles, 1));
  const int64_t possible = at_least(pieces / min_pieces, 1);
  const int64_t pieces_per_split = divide_up(pieces, at_most(at_most(wanted, possible), 65535));
  config.k_per_split = pieces_per_split * piece_k;
  config.split_k = divide_up(pieces, pieces_per_split);
  return config;
}

// The fastest of some configs of one algorithm; the first of those that are equal.
template <typename Gemm, int count>
constexpr Config fastest(const Problem& p, const int (&candidates)[count]) {
  Config best = Gemm::config_of(p, candidates[0]);
  for (const int candidate : candidates) {
    const Config config = Gemm::config_of(p, candidate);
    if (Gemm::cycles(p, config) < Gemm::cycles(p, best)) best = config;
  }
  return best;
}

}  // namespace exllama::cuda::cost
