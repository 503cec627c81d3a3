// The cost model: clock cycles from the first thread block of a gemm to its last result, to rank by.
//
// What it counts is exact: launches, bytes, instructions in the compiled loops. What a GPU makes of them is in rates.h.
#pragma once

#include <iterator>

#include "experts.h"
#include "gather.h"
#include "rates.h"
#include "splits.h"

namespace exllama::cuda::cost {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr double larger(double a, double b) { return a > b ? a : b; }
constexpr double smaller(double a, double b) { return a < b ? a : b; }

constexpr Rates rates_of(int32_t arch) {
  Rates rates = kRates[0];
  for (const Rates& of_arch : kRates) rates = of_arch.arch <= arch ? of_arch : rates;
  return rates;
}

// Cycles in a microsecond.
constexpr double clock_mhz(const Device& device) {
  return device.clock_khz > 0 ? static_cast<double>(device.clock_khz) / 1000 : 1000 * rates_of(device.arch).ghz;
}

// Bytes that the DRAM brings to all SMs in a cycle, at its nominal rate.
constexpr double dram_bytes_per_cycle(const Device& device) {
  if (device.dram_mb_per_s > 0) return static_cast<double>(device.dram_mb_per_s) / clock_mhz(device);
  return rates_of(device.arch).dram_bytes * static_cast<double>(device.sm_count);
}

constexpr double launch_cycles(const Device& device) { return kLaunchUs * clock_mhz(device); }

// What a product takes by a config.
struct Estimate {
  double cycles;
  int64_t launches;
  double dram_bytes;       // read and written
  double loads_in_flight;  // bytes of W that an SM waits for at a time, in the kernel that multiplies
};

// What a kernel does.
struct Work {
  int64_t thread_blocks;
  double dram_bytes, l2_bytes;  // of all thread blocks
  double sm_cycles;             // of all thread blocks, if they had one SM
  double loads_in_flight = 0;   // bytes that an SM waits for at a time; 0 for as many as it takes
};

// Cycles of the slowest resource, since they overlap, and a part of the others', since they do so imperfectly. The DRAM
// is the whole device's. An SM without a thread block computes nothing and asks for nothing, and the last thread blocks
// may leave SMs without one: all wait for the SM that has most of them.
constexpr double cycles_of(const Device& device, const Work& work) {
  const int64_t sms = device.sm_count, thread_blocks = at_least(work.thread_blocks, 1);
  const double busy = static_cast<double>(thread_blocks) / static_cast<double>(divide_up(thread_blocks, sms));
  double rate = kDramEfficiency * dram_bytes_per_cycle(device);
  if (work.loads_in_flight > 0) {
    const double waiting = work.loads_in_flight * static_cast<double>(at_most(thread_blocks, sms));
    rate = smaller(rate, waiting / (kDramLatencyUs * clock_mhz(device)));
  }
  const double dram = work.dram_bytes / rate;
  const double l2 = work.l2_bytes / (kL2BytesPerCycle * busy), compute = work.sm_cycles / busy;
  return (1 - kNotOverlapped) * larger(larger(dram, l2), compute) + kNotOverlapped * (dram + l2 + compute);
}

constexpr double weights_of(const Problem& p) { return static_cast<double>(p.K) * static_cast<double>(p.N); }
constexpr double weight_bytes(const Problem& p) {
  const double groups = static_cast<double>(p.K) / static_cast<double>(p.group_size);
  return weights_of(p) * p.bits / 8 + groups * static_cast<double>(p.N) * (2 + p.bits / 8.0);
}
constexpr double x_element_bytes(const Problem& p) { return p.x_dtype == DType::kFloat32 ? 4 : 2; }
constexpr double x_bytes(const Problem& p) {
  return static_cast<double>(p.M) * static_cast<double>(p.K) * x_element_bytes(p);
}
constexpr double out_bytes(const Problem& p) {
  return static_cast<double>(p.M) * static_cast<double>(p.N) * x_element_bytes(p);
}

// The weights that are read: 1, or the experts that have rows. That many are to be expected where a row is as likely to
// have one as another.
constexpr int64_t weights_with_rows(const Problem& p) {
  if (p.experts == 0) return 1;
  const auto experts = static_cast<double>(p.experts);
  double without = 1, power = 1 - 1 / experts;  // the part of the experts without a row: (1 - 1 / experts) ** M
  for (int64_t M = p.M; M > 0; M /= 2, power *= power) without *= M % 2 ? power : 1;
  return static_cast<int64_t>(experts * (1 - without) + 0.5);
}

// The tiles of so many rows that have any. An expert's last tile is as likely to have many as few.
constexpr int64_t row_tiles(const Problem& p, int64_t rows) {
  if (p.experts <= 1) return divide_up(p.M, rows);
  const int64_t experts = weights_with_rows(p);
  return at_least(divide_up(2 * p.M + experts * (rows - 1), 2 * rows), experts);
}

// How a kernel is made that goes over W once for every config.rows rows of x.
struct KernelShape {
  int64_t columns;       // of a tile
  double weight_cycles;  // of an SM, for a weight and all rows of a tile
  double block_loads;    // bytes of W that a thread block waits for at a time
  int64_t resident;      // thread blocks that an SM has registers for
};

// W comes from DRAM once, and so does that of each expert with rows, since the thread blocks of a tile of columns follow
// one another. x comes from L2 for every tile of columns. By an order of rows each number lies in a sector of its own, and
// another kernel gathers many rows of x before. Sums of a split K are written to L2, and added up by the last thread block
// of a tile. For many tiles another kernel does it.
constexpr Estimate kernel_estimate(const Problem& p, const Config& config, const KernelShape& shape) {
  const int64_t passes = row_tiles(p, config.rows), tiles = divide_up(p.N, shape.columns);
  const auto times = static_cast<double>(passes), column_tiles = static_cast<double>(tiles);
  const double words = weight_bytes(p), x = x_bytes(p), out = out_bytes(p);
  Work work{passes * tiles * config.split_k, words * static_cast<double>(weights_with_rows(p)) + x + out,
            words * times + x * column_tiles + out, weights_of(p) * times * shape.weight_cycles};
  const int64_t blocks_of_sm = divide_up(work.thread_blocks, p.device.sm_count);
  work.loads_in_flight = shape.block_loads * static_cast<double>(at_most(blocks_of_sm, shape.resident));
  Estimate estimate{0, 1, work.dram_bytes, work.loads_in_flight};
  if (gathers_x(p.has_perm, p.M, config)) {
    estimate.cycles += cycles_of(p.device, {p.device.sm_count, 0, 2 * x,
                                            static_cast<double>(p.M) * static_cast<double>(p.K) / kGatheredPerCycle});
    ++estimate.launches;
  } else if (p.has_perm) {
    work.l2_bytes += 4 * static_cast<double>(p.K) * times * column_tiles;
    work.sm_cycles += static_cast<double>(p.M) * static_cast<double>(p.K) * column_tiles / kGatheredPerCycle;
  }
  if (config.split_k > 1) {
    const double partials =
        4 * static_cast<double>(config.split_k) * static_cast<double>(p.M) * static_cast<double>(p.N);
    work.l2_bytes += partials;
    if (most_row_tiles(p.M, p.experts, config.rows) * tiles <= kTickets) {
      work.l2_bytes += partials;
      estimate.cycles += kTicketUs * clock_mhz(p.device);
    } else {
      estimate.cycles += cycles_of(p.device, {p.device.sm_count, 0, partials + out, 0});
      ++estimate.launches;
    }
  }
  if (p.experts > 0) estimate.cycles += kFindExpertUs * clock_mhz(p.device);
  estimate.cycles += cycles_of(p.device, work) + launch_cycles(p.device) * static_cast<double>(estimate.launches);
  return estimate;
}

// A product of (rows, K) and (K, columns) by a BLAS, which takes the best of its tiles.
constexpr double blas_cycles(const Problem& p, int64_t rows, int64_t columns) {
  const double rate = rates_of(p.device.arch).blas;
  double best = -1;
  for (const BlasTile& tile : kBlasTiles) {
    const int64_t tiles = divide_up(rows, tile.rows) * divide_up(columns, tile.columns);
    const auto tiles_of_sm = static_cast<double>(divide_up(tiles, p.device.sm_count));
    const double macs = static_cast<double>(tile.rows * tile.columns) * static_cast<double>(p.K);
    const double cycles = tiles_of_sm * macs / (rate * tile.efficiency);
    best = best < 0 ? cycles : smaller(best, cycles);
  }
  return best;
}

// Divides a K of `pieces` indivisible pieces into up to so many splits. No more than there are for four thread blocks on
// each SM, while every split keeps min_pieces.
constexpr Config split(Config config, const Problem& p, int64_t piece_k, int64_t tile_columns, int64_t min_pieces,
                       int64_t splits) {
  const int64_t tiles = at_least(divide_up(p.N, tile_columns) * row_tiles(p, config.rows), 1);
  const int64_t pieces = at_least(divide_up(p.K, piece_k), 1), possible = at_least(pieces / min_pieces, 1);
  const int64_t wanted = at_most(divide_up(4 * static_cast<int64_t>(p.device.sm_count), tiles), splits);
  const int64_t pieces_per_split = divide_up(pieces, at_most(wanted, possible));
  config.k_per_split = pieces_per_split * piece_k;
  config.split_k = divide_up(pieces, pieces_per_split);
  return config;
}

// The numbers of splits that the model tries.
inline constexpr int kSplits[] = {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512};

// The fastest config of one algorithm, of all sizes of a tile and splits; the first of those that are equal. More rows
// than there are in x cost time alone. In batch-invariant mode K is split as for one row of x, whatever M is.
template <typename Gemm, int count>
constexpr Config fastest(const Problem& p, const int (&sizes)[count]) {
  Config best{};
  double fewest = -1;
  const auto consider = [&](const Problem& problem, const Config& config) {
    const double cycles = Gemm::estimate(problem, config).cycles;
    if (fewest < 0 || cycles < fewest) best = config, fewest = cycles;
  };
  const auto consider_splits = [&](const Problem& problem, int size) {
    const Config most = Gemm::config_of(problem, size, kSplits[std::size(kSplits) - 1]);
    Config last = most;
    for (const int splits : kSplits) {
      if (splits >= most.split_k) break;
      const Config config = Gemm::config_of(problem, size, splits);
      if (config.split_k != last.split_k) consider(problem, config);
      last = config;
    }
    consider(problem, most);
    return most.rows >= problem.M;
  };
  if (!p.batch_invariant) {
    for (const int size : sizes) {
      if (consider_splits(p, size)) break;
    }
    return best;
  }
  Problem of_one_row = p;
  of_one_row.M = 1;
  consider_splits(of_one_row, sizes[0]);
  Config config = best;
  fewest = -1;
  for (const int size : sizes) {
    config.rows = Gemm::config_of(p, size, 1).rows;
    consider(p, config);
  }
  return best;
}

}  // namespace exllama::cuda::cost
