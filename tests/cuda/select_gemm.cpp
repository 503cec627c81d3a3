// select_gemm for Python: the fields of a problem in their order, the fields of a config, and the modelled cycles of
// each algorithm, which are negative if it cannot.
#include "cuda/select.h"

using namespace exllama::cuda;

namespace {

Problem problem_of(const int64_t* in) {
  // clang-format off
  return {in[0],      in[1],      in[2],      static_cast<int32_t>(in[3]), in[4], static_cast<DType>(in[5]),
          static_cast<DType>(in[6]), in[7] != 0, in[8] != 0, in[9] != 0, in[10] != 0, in[11] != 0,
          in[12] != 0, in[13] != 0, {static_cast<int32_t>(in[14]), static_cast<int32_t>(in[15]), in[16]}};
  // clang-format on
}

// It is a constant expression: nothing in it can read an environment, a clock or a device.
constexpr Config kConstant = select_gemm({1,
                                          4096,
                                          4096,
                                          4,
                                          128,
                                          DType::kFloat16,
                                          DType::kFloat16,
                                          true,
                                          false,
                                          false,
                                          true,
                                          false,
                                          false,
                                          false,
                                          {80, 108, 40 << 20}});
static_assert(kConstant.algorithm == Algorithm::kMma);

}  // namespace

extern "C" void select(const int64_t* problem, int64_t* config, double* algorithm_cycles) {
  const Problem p = problem_of(problem);
  const Config c = select_gemm(p);
  config[0] = static_cast<int64_t>(c.algorithm);
  config[1] = c.rows;
  config[2] = c.split_k;
  config[3] = c.k_per_split;
  config[4] = c.chunk;
  for (int i = 0; i < 4; ++i) {
    const Gemm& gemm = gemm_of(static_cast<Algorithm>(i));
    algorithm_cycles[i] = gemm.can(p) ? gemm.cycles(p, gemm.config(p)) : -1;
  }
}

// What an SM does in a clock cycle, in the order of the fields.
extern "C" void rates(int64_t arch, double* out) {
  const cost::Rates of_arch = cost::rates_of(static_cast<int32_t>(arch));
  out[0] = of_arch.dram_bytes;
  out[1] = of_arch.issues;
  out[2] = of_arch.floats;
  out[3] = of_arch.mma;
  out[4] = of_arch.blas;
}

// What the model takes for the instructions of a weight, by a kernel for so many rows of x.
extern "C" double instructions(const int64_t* problem, int64_t algorithm, int64_t rows) {
  const bool scalar = static_cast<Algorithm>(algorithm) == Algorithm::kScalar;
  return (scalar ? GemmScalar::instructions : GemmMma::instructions)(problem_of(problem), rows);
}

extern "C" int64_t additions(int64_t algorithm, int64_t K, int64_t groups) {
  return gemm_of(static_cast<Algorithm>(algorithm)).additions(K, groups);
}
