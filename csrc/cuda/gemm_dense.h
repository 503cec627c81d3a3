// A gemm by torch's matmul and dequantize, which the bindings call chunk by chunk: what select_gemm asks of it.
#pragma once

#include "cost.h"

namespace exllama::cuda {

struct GemmDense {
  static constexpr Algorithm kAlgorithm = Algorithm::kDense;
  static constexpr const char* kName = "dense";

  // What torch's matmul computes with a float32 result. It takes bfloat16 from sm_80 on. That of float32 may run in
  // TF32, as its user set it, and the product is promised in float32.
  static constexpr bool blas_takes(const Problem& p) {
    if (p.x_dtype == DType::kBFloat16) return p.device.arch >= 80;
    return p.x_dtype == DType::kFloat16 && !p.fp16_accumulation;
  }

  // In batch-invariant mode a row must not depend on M, by which a BLAS chooses its tiles.
  static constexpr bool can(const Problem& p) { return !p.batch_invariant && !p.blas_refused && blas_takes(p); }

  // A chunk of W in x's dtype and its float32 result take no more than 64 MiB and half the L2 together, or else the
  // chunk has 64 columns. The result is no larger than the chunk, or has no more than 64 rows: x is divided for that.
  static constexpr Config config(const Problem& p) {
    using namespace cost;
    const int64_t bytes = at_most(int64_t{64} << 20, p.device.l2_bytes / 2);
    const int64_t rows = at_least(at_most(p.M, at_least(p.K / 2, 64)), 1);
    const int64_t columns = bytes / (2 * p.K + 4 * rows) / 64 * 64;
    return {kAlgorithm, rows, 1, p.K, at_most(at_least(columns, 64), at_least(p.N, 1))};
  }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of.
  // They are a chain of K. W is rounded before them.
  static constexpr int64_t additions(int64_t K, int64_t) { return K + 2; }

  // Instructions of dequantize for a weight: a thread has a block of words.
  static constexpr double dequantize_instructions(int32_t bits) { return 15 + 120.0 / layout::block_values(bits); }

  // Chunk by chunk, W is dequantized into L2 and multiplied, and the float32 result is rounded into place. By an order of
  // rows, a chunk is filled with NaN before.
  static constexpr cost::Estimate estimate(const Problem& p, const Config& config) {
    using namespace cost;
    const double weights = weights_of(p), words = weight_bytes(p);
    const double dequantize =
        cycles_of(p.device, {p.device.sm_count, words, 2 * weights,
                             weights * dequantize_instructions(p.bits) / rates_of(p.device.arch).issues});
    const double rounding = cycles_of(p.device, {p.device.sm_count, 0, 10 * out_bytes(p) / x_element_bytes(p), 0});
    const int64_t chunks = divide_up(p.N, config.chunk), parts = divide_up(p.M, config.rows);
    const auto products_of = [&](int64_t columns) {
      const auto whole = static_cast<double>(p.M / config.rows);
      return whole * blas_cycles(p, config.rows, columns) + blas_cycles(p, p.M % config.rows, columns);
    };
    const double products =
        static_cast<double>(p.N / config.chunk) * products_of(config.chunk) + products_of(p.N % config.chunk);
    const int64_t launches = chunks * ((p.has_perm ? 2 : 1) + 2 * parts);
    return {dequantize + products + rounding + launch_cycles(p.device) * static_cast<double>(launches), launches,
            words + x_bytes(p) + out_bytes(p), 0};
  }
};

}  // namespace exllama::cuda
