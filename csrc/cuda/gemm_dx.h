// The choice of gptq_gemm_dx between gemm_tiled and a dense W: a pure function, without CUDA.
#pragma once

#include "gemm_dense.h"
#include "gemm_tiled.h"
#include "limbs.h"

namespace exllama::cuda {

// The product (M, N) @ (N, K) of a gradient and W^T, as that of another weight: K and N have changed places.
constexpr Problem transposed(Problem p) {
  const int64_t K = p.K;
  p.K = p.N;
  p.N = K;
  p.has_perm = false;
  return p;
}

// By limbs a chunk of rows of W is made of numbers of 16 bits, whose sum it is exactly. torch's matmul multiplies each
// limb to float32, and a kernel adds up the products.
struct GemmDxDense {
  static constexpr Limbs limbs(const Problem& p) { return limbs_of(p.x_dtype, p.scales_dtype, p.bits); }

  static constexpr bool can(const Problem& p) { return GemmDense::can(p) && limbs(p).count > 0; }

  static constexpr Config config(const Problem& p) {
    using namespace cost;
    const int64_t count = limbs(p).count, chunk = dense_chunk(p, p.K, 2 * count * p.N);
    const int64_t rows = at_least(dense_scratch_bytes(p) / (4 * count * chunk), 64);
    return {Algorithm::kDense, at_least(at_most(p.M, rows), 1), 1, p.N, chunk};
  }

  // The additions that a product meets on its way to the result, which exllama_ops/testing/errors.py makes a bound of:
  // a chain of N, and those of the other limbs.
  static constexpr int64_t additions(int64_t N) { return N + kMaxLimbs - 1; }

  static constexpr double cycles(const Problem& p, const Config& config) {
    using namespace cost;
    const double weights = weights_of(p), count = limbs(p).count, dense = 2 * count * weights;
    const double dense_dram = dense_dram_bytes(p, 2 * limbs(p).count * p.N * config.chunk, dense);
    const double dequantize = cycles_of(
        p.device, {p.device.sm_count, weight_bytes(p) + dense_dram, dense,
                   weights * (GemmDense::dequantize_instructions(p) + 3 * count) / rates_of(p.device.arch).issues});
    const double adding = cycles_of(p.device, {p.device.sm_count, 0, (4 * count + 2) * x_bytes(p) / 2, 0});
    const int64_t chunks = divide_up(p.K, config.chunk), parts = divide_up(p.M, config.rows);
    const double products = count * blas_cycles(transposed(p), config.rows, config.chunk) *
                            static_cast<double>(chunks) * static_cast<double>(parts);
    const auto times = static_cast<double>(parts);
    const double reading = cycles_of(p.device, {p.device.sm_count, dense_dram * times, dense * times, 0});
    const int64_t launches = (p.has_perm ? 1 : 0) + chunks * (1 + parts * (limbs(p).count + 1));
    return dequantize + larger(products, reading) + adding + launch_cycles(p.device) * static_cast<double>(launches);
  }
};

// The config of what is faster by the cost model.
constexpr Config select_dx(const Problem& p) {
  const Config tiled = GemmTiled::config(transposed(p));
  if (!GemmDxDense::can(p)) return tiled;
  const Config dense = GemmDxDense::config(p);
  return GemmDxDense::cycles(p, dense) < GemmTiled::estimate(transposed(p), tiled).cycles ? dense : tiled;
}

}  // namespace exllama::cuda
