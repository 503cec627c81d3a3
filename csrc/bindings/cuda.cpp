// The CUDA kernels as implementations of the ops, over torch's stable ABI: checks, memory, streams, registration.
//
// As in cpu.cpp, loading has no effect, exllama_cuda_register gives ops their kernels, and schemas come from Python.
// Built with EXLLAMA_CUDA_ON_CPU, the kernels are registered for CPU tensors: tests run them on an emulated device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/blas.h"
#include "bindings/dense.h"
#include "bindings/device_scope.h"
#include "bindings/ops.h"
#include "bindings/registration.h"
#include "bindings/workspace.h"
#include "cuda/cuda.h"
#include "cuda/gemm_dx.h"

namespace exllama::bindings {
namespace {

#ifdef EXLLAMA_CUDA_ON_CPU
constexpr const char* kDispatchKey = "CPU";
constexpr bool kOnCpu = true;
#else
constexpr const char* kDispatchKey = "CUDA";
constexpr bool kOnCpu = false;
#endif

std::atomic<bool> batch_invariant{false};

int32_t device_of(const Tensor& tensor) { return kOnCpu ? 0 : tensor.device_index(); }

const char* name_of(layout::DType dtype) {
  return dtype == layout::DType::kFloat16 ? "float16" : dtype == layout::DType::kBFloat16 ? "bfloat16" : "float32";
}

// What four variables say. They are read when the library is loaded and when a program asks for it. Ops do not read them:
// getenv does not survive another thread that sets a variable.
struct Settings {
  std::string algorithm;  // EXLLAMA_OPS_CUDA_ALGORITHM: the one to use, if it is not empty
  bool log;               // EXLLAMA_OPS_CUDA_LOG=1: a line on stderr for every choice
  std::string dense_mib;  // EXLLAMA_OPS_CUDA_DENSE_MIB: the scratch memory of a dense W, if it is not empty
  bool blas_repeats;      // CUBLAS_WORKSPACE_CONFIG has one of the values with which torch calls BLAS deterministic
};

// It is never freed: another thread may be reading it. A fifth variable is for the launches of the kernels.
const Settings* read_settings() {
  const char* algorithm = std::getenv("EXLLAMA_OPS_CUDA_ALGORITHM");
  const char* log = std::getenv("EXLLAMA_OPS_CUDA_LOG");
  const char* dense_mib = std::getenv("EXLLAMA_OPS_CUDA_DENSE_MIB");
  const char* overlap = std::getenv("EXLLAMA_OPS_CUDA_OVERLAP");
  const char* workspace = std::getenv("CUBLAS_WORKSPACE_CONFIG");
  cuda::set_launches_overlap(overlap != nullptr && std::strcmp(overlap, "1") == 0);
  const bool repeats =
      workspace != nullptr && (std::strcmp(workspace, ":4096:8") == 0 || std::strcmp(workspace, ":16:8") == 0);
  return new Settings{algorithm != nullptr ? algorithm : "", log != nullptr && std::strcmp(log, "1") == 0,
                      dense_mib != nullptr ? dense_mib : "", repeats};
}

std::atomic<const Settings*> settings{read_settings()};

void log_choice(const char* op, const cuda::Problem& problem, const cuda::Config& config) {
  if (!settings.load(std::memory_order_acquire)->log) return;
  const std::string experts = problem.experts > 0 ? " experts=" + std::to_string(problem.experts) : "";
  std::fprintf(stderr,
               "exllama_ops: %s M=%lld K=%lld N=%lld%s bits=%d group_size=%lld x=%s scales=%s %s sm_%d: %s "
               "rows=%lld split_k=%lld chunk=%lld\n",
               op, static_cast<long long>(problem.M), static_cast<long long>(problem.K),
               static_cast<long long>(problem.N), experts.c_str(), problem.bits,
               static_cast<long long>(problem.group_size), name_of(problem.x_dtype), name_of(problem.scales_dtype),
               problem.raw_g_idx  ? "g_idx"
               : problem.has_perm ? "perm"
               : problem.shuffled ? "shuffled"
                                  : "unshuffled",
               problem.device.arch, cuda::gemm_of(config.algorithm).name, static_cast<long long>(config.rows),
               static_cast<long long>(config.split_k), static_cast<long long>(config.chunk));
}

// What select_gemm says, unless the settings name another algorithm, which must be able to compute the problem.
cuda::Config choose(const char* op, const cuda::Problem& problem) {
  const std::string& given = settings.load(std::memory_order_acquire)->algorithm;
  if (given.empty()) return cuda::select_gemm(problem);
  std::string names;
  for (const cuda::Gemm& gemm : cuda::Gemms::kAll) {
    names += (names.empty() ? "" : ", ") + std::string(gemm.name);
    if (given != gemm.name) continue;
    if (gemm.can(problem)) return gemm.config(problem);
    throw std::invalid_argument(std::string(op) + ": EXLLAMA_OPS_CUDA_ALGORITHM=" + given +
                                " cannot compute these arguments on this GPU, as torch is set");
  }
  throw std::invalid_argument(std::string(op) + ": EXLLAMA_OPS_CUDA_ALGORITHM must be one of " + names + "; got " +
                              given);
}

// What select_dx says, unless the settings name one of the two ways, and it can compute the problem.
cuda::Config choose_dx(const cuda::Problem& problem) {
  const std::string& given = settings.load(std::memory_order_acquire)->algorithm;
  if (given == cuda::GemmTiled::kName) return cuda::GemmTiled::config(cuda::transposed(problem));
  if (given == cuda::GemmDense::kName && cuda::GemmDxDense::can(problem)) return cuda::GemmDxDense::config(problem);
  return cuda::select_dx(problem);
}

// The scratch memory that a dense W may take, as the settings name it; 0 if they do not.
int64_t dense_mib() {
  const std::string& given = settings.load(std::memory_order_acquire)->dense_mib;
  if (given.empty()) return 0;
  char* end = nullptr;
  const long long mib = std::strtoll(given.c_str(), &end, 10);
  if (*end == '\0' && mib > 0 && mib <= 1 << 20) return mib;
  throw std::invalid_argument("gptq_gemm: EXLLAMA_OPS_CUDA_DENSE_MIB must be a number of MiB from 1 to 1048576; got " +
                              given);
}

// A product as the choice sees it, by what torch says at this moment.
cuda::Problem problem_of(const layout::Weight* parts, int64_t count, const cuda::Experts& experts, const Tensor& x,
                         const cuda::Device& device) {
  const layout::DType dtype = dtype_of(x);
  cuda::Problem problem = cuda::problem_of(parts, count, experts, dtype, x.size(0), device,
                                           batch_invariant.load(std::memory_order_relaxed));
  problem.fp16_accumulation = blas::fp16_accumulation();
  problem.blas_refused = blas::deterministic() && !settings.load(std::memory_order_acquire)->blas_repeats;
  problem.dense_mib = dense_mib();
  problem.blas_rounds_once = blas::reduces_in_float32(dtype == layout::DType::kBFloat16);
  return problem;
}

// An index in the device's memory, whose values no host can look at without a sync. Kernels check what they read.
class DeviceIndex {
 public:
  DeviceIndex(const char*, const char*, const Tensor& index, int64_t, bool)
      : values_(index.size(0) != 0 ? index.data<const int32_t>() : nullptr) {}
  DeviceIndex(const char*, const Tensor& g_idx, const Shape&) : values_(g_idx.data<const int32_t>()) {}
  const int32_t* get() const { return values_; }

 private:
  const int32_t* values_;
};

// Whether some rows of the words name no column of x. If all do, the first list of the order is a permutation.
bool is_filled(const layout::Weight& weight) { return weight.in_features < weight.K; }

layout::Weight without_order(layout::Weight weight) {
  weight.row_order = nullptr;
  weight.in_features = weight.K;
  return weight;
}

// Experts, and the first of their weights, behind which the others lie.
struct Stack {
  layout::Weight first;
  cuda::Experts experts;

  Stack(const ExpertsArguments& arguments, const Shape& shape)
      : first(
            arguments.weight(0, shape, arguments.ordered() ? arguments.options.g_idx.data<const int32_t>() : nullptr)),
        experts{arguments.offsets.data<const int32_t>(), arguments.qweight.size(0)} {}
};

// What Ops asks of a device.
struct Cuda {
  using Index = DeviceIndex;

  static void check(const char*) {}

  static void gemm(const layout::Weight* parts, int64_t count, const Tensor& x, const Tensor& out) {
    product("gptq_gemm", parts, count, {}, x, out);
  }

  static void gemm_dx(const layout::Weight& weight, const Tensor& grad, const Tensor& dx) {
    product_dx("gptq_gemm_dx", weight, {}, grad, dx);
  }

  static void moe_gemm(const ExpertsArguments& arguments, const Shape& shape, const Tensor& x, const Tensor& out) {
    const Stack stack(arguments, shape);
    if (x.size(0) > 0) product("gptq_moe_gemm", &stack.first, 1, stack.experts, x, out);
  }

  static void moe_gemm_dx(const ExpertsArguments& arguments, const Shape& shape, const Tensor& grad, const Tensor& dx) {
    const Stack stack(arguments, shape);
    if (grad.size(0) > 0) product_dx("gptq_moe_gemm_dx", stack.first, stack.experts, grad, dx);
  }

  static void dequantize(const layout::Weight& weight, const Tensor& out) {
    const DeviceScope scope(device_of(out));
    if (is_filled(weight)) {
      const int64_t sizes[] = {weight.K, weight.N};
      const Tensor all_rows = Tensor::empty(sizes, out.dtype(), out);
      dequantize(without_order(weight), all_rows);
      return cuda::gather_rows_of_w(weight, all_rows.data<const void>(), out.data<void>(), scope.stream());
    }
    cuda::dequantize(weight, 0, weight.N, out.data<void>(), dtype_of(out), scope.stream());
  }

  static void shuffle(const Tensor& qweight, const int32_t* perm, int64_t K, int32_t bits) {
    const DeviceScope scope(device_of(qweight));
    const int64_t N = qweight.size(1);
    const Workspace workspace(cuda::shuffle_workspace_bytes(K, N, bits, perm != nullptr), qweight);
    cuda::shuffle(qweight.data<uint32_t>(), perm, K, N, bits, workspace.get(), scope.stream());
  }

  static void unshuffle(const Tensor& qweight, const int32_t* perm, int64_t K, int32_t bits, const Tensor& out) {
    const DeviceScope scope(device_of(qweight));
    const Workspace workspace(cuda::unshuffle_workspace_bytes(K, perm != nullptr), qweight);
    cuda::unshuffle(qweight.data<const uint32_t>(), perm, K, qweight.size(1), bits, out.data<uint32_t>(),
                    workspace.get(), scope.stream());
  }

 private:
  static void product(const char* op, const layout::Weight* parts, int64_t count, const cuda::Experts& experts,
                      const Tensor& x, const Tensor& out) {
    const DeviceScope scope(device_of(x));
    const int64_t M = x.size(0);
    if (is_filled(*parts)) {
      const int64_t sizes[] = {M, parts->K};
      const Tensor gathered = Tensor::empty(sizes, x.dtype(), x);
      cuda::gather_x(*parts, experts, x.data<const void>(), dtype_of(x), M, gathered.data<void>(), scope.stream());
      std::vector<layout::Weight> plain(parts, parts + count);
      for (layout::Weight& part : plain) part = without_order(part);
      return product(op, plain.data(), count, experts, gathered, out);
    }
    const cuda::Problem problem = problem_of(parts, count, experts, x, scope.device());
    const cuda::Config config = choose(op, problem);
    log_choice(op, problem, config);
    if (config.algorithm == cuda::Algorithm::kDense) {
      int64_t first_column = 0;
      for (const layout::Weight* part = parts; part != parts + count; first_column += part->N, ++part) {
        gemm_dense(*part, x, out, first_column, config, problem.blas_rounds_once, scope.stream());
      }
      return;
    }
    const Workspace workspace(cuda::gemm_workspace_bytes(problem, config), x);
    cuda::gemm(parts, count, experts, x.data<const void>(), dtype_of(x), M, out.data<void>(), config, workspace.get(),
               scope.stream());
  }

  static void product_dx(const char* op, const layout::Weight& weight, const cuda::Experts& experts, const Tensor& grad,
                         const Tensor& dx) {
    const DeviceScope scope(device_of(grad));
    if (is_filled(weight)) {
      const int64_t sizes[] = {grad.size(0), weight.K};
      const Tensor of_all_rows = Tensor::empty(sizes, dx.dtype(), dx);
      product_dx(op, without_order(weight), experts, grad, of_all_rows);
      return cuda::gather_dx(weight, experts, of_all_rows.data<const void>(), dtype_of(dx), grad.size(0),
                             dx.data<void>(), scope.stream());
    }
    const cuda::Problem problem = problem_of(&weight, 1, experts, grad, scope.device());
    const cuda::Config config = choose_dx(problem);
    log_choice(op, problem, config);
    if (config.algorithm == cuda::Algorithm::kDense) return gemm_dx_dense(weight, grad, dx, config, scope.stream());
    cuda::gemm_dx(weight, experts, grad.data<const void>(), dtype_of(grad), grad.size(0), dx.data<void>(),
                  scope.stream());
  }
};

}  // namespace
}  // namespace exllama::bindings

#define EXLLAMA_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel of one op, or of every op if `op` is null. The operator namespace has the schemas or will have
// them. Returns null, or what went wrong; the text lives until the thread's next call.
EXLLAMA_EXPORT const char* exllama_cuda_register(const char* name_space, const char* op) {
  using namespace exllama::bindings;
  return register_kernels(kImplementations<Cuda>, name_space, op, kDispatchKey);
}

// What `op` may be: name by index, null after the last.
EXLLAMA_EXPORT const char* exllama_cuda_op_name(int32_t index) {
  using namespace exllama::bindings;
  return op_name(kImplementations<Cuda>, index);
}

// The version of the CUDA runtime that is linked in, as 13000 for 13.0.
EXLLAMA_EXPORT int32_t exllama_cuda_toolkit_version() { return exllama::cuda::toolkit_version(); }

// Reads the variables of Settings again, for programs that change them.
EXLLAMA_EXPORT void exllama_cuda_read_environment() {
  using namespace exllama::bindings;
  settings.store(read_settings(), std::memory_order_release);
}

// Whether a row's bits must not depend on the rows that it is batched with.
EXLLAMA_EXPORT void exllama_cuda_set_batch_invariant(bool enabled) {
  exllama::bindings::batch_invariant.store(enabled, std::memory_order_relaxed);
}

EXLLAMA_EXPORT bool exllama_cuda_get_batch_invariant() {
  return exllama::bindings::batch_invariant.load(std::memory_order_relaxed);
}
