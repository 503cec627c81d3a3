// Which kernel computes a gemm, and how it is divided: one pure function of the problem, without CUDA.
//
// To add an algorithm, write its struct in a header gemm_*.h, as gemm_tiled.h does, and name it in Gemms. Give it a
// value of Algorithm in problem.h and a launch in gemm.cu; the compiler says where that is missing. Its bound is
// declared in exllama_ops/testing/errors.py, which a test holds to `additions`.
#pragma once

#include "gemm_dense.h"
#include "gemm_mma.h"
#include "gemm_pipelined.h"
#include "gemm_scalar.h"
#include "gemm_tiled.h"
#include "problem.h"

namespace exllama::cuda {

// What is known of an algorithm.
struct Gemm {
  Algorithm algorithm;
  const char* name;  // as EXLLAMA_OPS_CUDA_ALGORITHM has it
  bool (*can)(const Problem&);
  Config (*config)(const Problem&);  // its fastest one by the cost model, if it can
  cost::Estimate (*estimate)(const Problem&, const Config&);
  int64_t (*additions)(int64_t K, int64_t groups);  // that a product meets on its way to the result
};

template <typename... Each>
struct GemmList {
  static constexpr Gemm kAll[] = {
      {Each::kAlgorithm, Each::kName, Each::can, Each::config, Each::estimate, Each::additions}...};
};

// Every algorithm. Batch-invariant mode takes the first that can.
using Gemms = GemmList<GemmMma, GemmScalar, GemmPipelined, GemmTiled, GemmDense>;

constexpr const Gemm& gemm_of(Algorithm algorithm) {
  const Gemm* gemm = Gemms::kAll;
  while (gemm->algorithm != algorithm) ++gemm;
  return *gemm;
}

// The fastest config of all by the cost model. In batch-invariant mode the choice must not depend on M, nor may it fall
// on another kernel for a larger M.
constexpr Config select_gemm(const Problem& p) {
  Config best{};
  double fewest = -1;
  for (const Gemm& gemm : Gemms::kAll) {
    if (!gemm.can(p)) continue;
    const Config config = gemm.config(p);
    if (p.batch_invariant) return config;
    const double cycles = gemm.estimate(p, config).cycles;
    if (fewest < 0 || cycles < fewest) best = config, fewest = cycles;
  }
  return best;
}

}  // namespace exllama::cuda
