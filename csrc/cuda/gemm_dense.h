// A gemm by torch's matmul and dequantize, which the bindings call chunk by chunk: what select_gemm asks of it.
#pragma once

#include "cost.h"

namespace exllama::cuda {

// Memory for numbers of W, and as much for their products.
constexpr int64_t dense_scratch_bytes(const Problem& p) {
  return p.dense_mib > 0 ? p.dense_mib << 20 : int64_t{64} << 20;
}

// How many of all columns of W, or of its rows, the scratch memory has room for. Chunks are equal, have whole tiles of a
// BLAS, and 64 at least.
constexpr int64_t dense_chunk(const Problem& p, int64_t all, int64_t bytes_of_one) {
  using namespace cost;
  const int64_t room = dense_scratch_bytes(p) / at_least(bytes_of_one, 1), tile = room < 128 ? 64 : 128;
  const int64_t chunks = at_least(divide_up(all, at_least(room / tile, 1) * tile), 1);
  return at_least(at_most(divide_up(divide_up(all, chunks), tile) * tile, all), 1);
}

// What comes from DRAM, and goes there, of numbers that lie in chunks of so many bytes: none that stay in half the L2.
constexpr double dense_dram_bytes(const Problem& p, int64_t bytes_of_chunk, double bytes) {
  return bytes_of_chunk <= p.device.l2_bytes / 2 ? 0 : bytes;
}

struct GemmDense {
  static constexpr Algorithm kAlgorithm = Algorithm::kDense;
  static constexpr const char* kName = "dense";

  // What torch's matmul computes with a float32 result. It takes bfloat16 from sm_80 on. That of float32 may run in
  // TF32, as its user set it, and the product is promised in float32.
  static constexpr bool blas_takes(const Problem& p) {
    if (p.x_dtype == DType::kBFloat16) return p.device.arch >= 80;
    return p.x_dtype == DType::kFloat16 && !p.fp16_accumulation;
  }

  // In batch-invariant mode a row must not depend on M, by which a BLAS chooses its tiles. Which experts have rows, and how
  // many, no host knows.
  static constexpr bool can(const Problem& p) {
    return !p.batch_invariant && !p.blas_refused && p.experts == 0 && blas_takes(p);
  }

  // W in x's dtype takes no more scratch memory than dense_scratch_bytes, or else is made in chunks of columns. The
  // float32 result of a matmul takes no more either, or x is divided. A BLAS that rounds once needs no such result.
  static constexpr Config config(const Problem& p) {
    using namespace cost;
    const int64_t chunk = dense_chunk(p, p.N, 2 * p.K);
    const int64_t rows = p.blas_rounds_once ? p.M : at_least(dense_scratch_bytes(p) / (4 * chunk), 64);
    return {kAlgorithm, at_least(at_most(p.M, rows), 1), 1, p.K, chunk};
  }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are a chain of K. W is rounded before them.
  static constexpr int64_t additions(int64_t K, int64_t) { return K + 2; }

  // Instructions of dequantize for a weight: a thread has a block of words, of eight columns or of one.
  static constexpr double dequantize_instructions(const Problem& p) {
    const int values = layout::block_values(p.bits);
    const bool by_row = p.raw_g_idx || (p.group_size % values != 0 && p.group_size < p.K);
    return by_row || !p.aligned ? 15 + 120.0 / values : 6 + 14.0 / values;
  }

  // Chunk by chunk, W is dequantized and multiplied, and a float32 result is rounded into place. By an order of rows, a
  // chunk is filled with NaN before.
  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    using namespace cost;
    const double weights = weights_of(p), words = weight_bytes(p), dense = 2 * weights;
    const double dense_dram = dense_dram_bytes(p, 2 * p.K * config.chunk, dense);
    const double dequantize =
        cycles_of(p.device, {p.device.sm_count, words + dense_dram, dense,
                             weights * dequantize_instructions(p) / rates_of(p.device.arch).issues});
    const double rounded_bytes = p.blas_rounds_once ? 0 : 10 * out_bytes(p) / x_element_bytes(p);
    const double rounding = cycles_of(p.device, {p.device.sm_count, 0, rounded_bytes, 0});
    const int64_t chunks = divide_up(p.N, config.chunk), parts = divide_up(p.M, config.rows);
    const auto products_of = [&](int64_t columns) {
      const auto whole = static_cast<double>(p.M / config.rows);
      return whole * blas_cycles(p, config.rows, columns) + blas_cycles(p, p.M % config.rows, columns);
    };
    const double products =
        static_cast<double>(p.N / config.chunk) * products_of(config.chunk) + products_of(p.N % config.chunk);
    const auto times = static_cast<double>(parts);
    const double reading = cycles_of(p.device, {p.device.sm_count, dense_dram * times, dense * times, 0});
    const int64_t launches = chunks * ((p.has_perm ? 2 : 1) + (p.blas_rounds_once ? 1 : 2) * parts);
    return {dequantize + larger(products, reading) + rounding + launch_cycles(p.device) * static_cast<double>(launches),
            launches, words + dense_dram * (1 + times) + x_bytes(p) + out_bytes(p), 0};
  }
};

}  // namespace exllama::cuda
