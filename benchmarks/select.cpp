// select_gemm as C functions, for benchmarks.select and the tests. Nothing here needs CUDA.
#include "cuda/select.h"
#include "cuda/gemm_dx.h"

using namespace exllama::cuda;

namespace {

Problem problem_of(const int64_t* in) {
  Problem p{};
  p.M = in[0], p.K = in[1], p.N = in[2];
  p.bits = static_cast<int32_t>(in[3]);
  p.group_size = in[4];
  p.x_dtype = static_cast<DType>(in[5]);
  p.scales_dtype = static_cast<DType>(in[6]);
  p.shuffled = in[7] != 0;
  p.has_perm = in[8] != 0;
  p.raw_g_idx = in[9] != 0;
  p.aligned = in[10] != 0;
  p.batch_invariant = in[11] != 0;
  p.fp16_accumulation = in[12] != 0;
  p.blas_refused = in[13] != 0;
  p.experts = in[14];
  p.device = {static_cast<int32_t>(in[15]), static_cast<int32_t>(in[16]), in[17], in[18], in[19]};
  return p;
}

void give(const Config& c, int64_t* out) {
  out[0] = static_cast<int64_t>(c.algorithm);
  out[1] = c.rows;
  out[2] = c.split_k;
  out[3] = c.k_per_split;
  out[4] = c.chunk;
}

// It is a constant expression: nothing in it can read an environment, a clock or a device.
constexpr Config chosen_on_an_a100() {
  Problem p{};
  p.M = 1, p.K = 4096, p.N = 4096, p.bits = 4, p.group_size = 128, p.shuffled = true, p.aligned = true;
  p.device = {80, 108, 40 << 20, 1410000, 2039000};
  return select_gemm(p);
}
static_assert(chosen_on_an_a100().algorithm == Algorithm::kMma);

}  // namespace

extern "C" {

// The fields of what is chosen for a problem, whose fields are in their order.
void chosen(const int64_t* problem, int64_t* config) { give(select_gemm(problem_of(problem)), config); }

// Likewise of gptq_gemm_dx, whose x is the gradient.
void chosen_dx(const int64_t* problem, int64_t* config) { give(select_dx(problem_of(problem)), config); }

// The best config of an algorithm, if it can.
bool best(const int64_t* problem, int64_t algorithm, int64_t* config) {
  const Problem p = problem_of(problem);
  const Gemm& gemm = gemm_of(static_cast<Algorithm>(algorithm));
  if (!gemm.can(p)) return false;
  give(gemm.config(p), config);
  return true;
}

// What the model says of a config: microseconds, and the other fields of an estimate.
void estimate(const int64_t* problem, const int64_t* config, double* out) {
  const Problem p = problem_of(problem);
  const Config c{static_cast<Algorithm>(config[0]), config[1], config[2], config[3], config[4]};
  const cost::Estimate estimate = gemm_of(c.algorithm).estimate(p, c);
  out[0] = estimate.cycles / cost::clock_mhz(p.device);
  out[1] = static_cast<double>(estimate.launches);
  out[2] = estimate.dram_bytes;
  out[3] = estimate.loads_in_flight;
}

// The tiles of so many rows that the model expects, and the most that there may be.
void row_tiles(const int64_t* problem, int64_t rows, int64_t* out) {
  const Problem p = problem_of(problem);
  out[0] = cost::row_tiles(p, rows);
  out[1] = most_row_tiles(p.M, p.experts, rows);
}

// What an SM does in a clock cycle, in the order of the fields.
void rates(int64_t arch, double* out) {
  const cost::Rates of_arch = cost::rates_of(static_cast<int32_t>(arch));
  out[0] = of_arch.dram_bytes;
  out[1] = of_arch.ghz;
  out[2] = of_arch.issues;
  out[3] = of_arch.floats;
  out[4] = of_arch.mma;
  out[5] = of_arch.blas;
}

// What the model takes for the instructions of a weight, by a kernel for so many rows of x.
double instructions(const int64_t* problem, int64_t algorithm, int64_t rows) {
  const Problem p = problem_of(problem);
  if (static_cast<Algorithm>(algorithm) == Algorithm::kScalar) return GemmScalar::instructions(p, rows);
  if (static_cast<Algorithm>(algorithm) == Algorithm::kPipelined) return GemmPipelined::instructions(p, rows);
  return GemmMma::instructions(p, rows);
}

int64_t additions(int64_t algorithm, int64_t K, int64_t groups) {
  return gemm_of(static_cast<Algorithm>(algorithm)).additions(K, groups);
}

int64_t dx_additions(int64_t N) { return GemmDxDense::additions(N); }

}  // extern "C"
