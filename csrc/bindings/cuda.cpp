// The CUDA kernels as implementations of the ops, over torch's stable ABI: checks, memory, streams, registration.
//
// As in cpu.cpp, loading has no effect, exllama_cuda_register gives ops their kernels, and schemas come from Python.
// Built with EXLLAMA_CUDA_ON_CPU, the kernels are registered for CPU tensors: tests run them on an emulated device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/registration.h"
#include "cuda/cuda.h"

// It is in libtorch_cuda. Weak, so that the library loads beside a torch without CUDA, where no kernel is called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                 void** ret_stream);

namespace exllama::bindings {
namespace {

using torch::stable::detail::to;

#ifdef EXLLAMA_CUDA_ON_CPU
constexpr const char* kDispatchKey = "CPU";
constexpr bool kOnCpu = true;
#else
constexpr const char* kDispatchKey = "CUDA";
constexpr bool kOnCpu = false;
#endif

std::atomic<bool> batch_invariant{false};

// The device of a tensor, made the current one, and torch's current stream on it.
class Place {
 public:
  explicit Place(const Tensor& tensor) : index_(kOnCpu ? 0 : tensor.device_index()), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  cuda::Stream stream() const { return stream_; }
  const cuda::Device& device() const { return cuda::device_properties(index_); }

 private:
  int32_t index_;
  cuda::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

const char* name_of(layout::DType dtype) {
  return dtype == layout::DType::kFloat16 ? "float16" : dtype == layout::DType::kBFloat16 ? "bfloat16" : "float32";
}

// EXLLAMA_OPS_CUDA_LOG=1: a line on stderr for every choice.
void log_choice(const cuda::Problem& problem, const cuda::Config& config) {
  const char* log = std::getenv("EXLLAMA_OPS_CUDA_LOG");
  if (log == nullptr || std::strcmp(log, "1") != 0) return;
  std::fprintf(stderr,
               "exllama_ops: gptq_gemm M=%lld K=%lld N=%lld bits=%d group_size=%lld x=%s scales=%s %s sm_%d: %s "
               "rows=%lld split_k=%lld chunk=%lld\n",
               static_cast<long long>(problem.M), static_cast<long long>(problem.K), static_cast<long long>(problem.N),
               problem.bits, static_cast<long long>(problem.group_size), name_of(problem.x_dtype),
               name_of(problem.scales_dtype),
               problem.raw_g_idx ? "g_idx" : problem.has_perm ? "perm" : problem.shuffled ? "shuffled" : "unshuffled",
               problem.device.arch, cuda::gemm_of(config.algorithm).name, static_cast<long long>(config.rows),
               static_cast<long long>(config.split_k), static_cast<long long>(config.chunk));
}

// What select_gemm says, unless EXLLAMA_OPS_CUDA_ALGORITHM names another, which must be able to compute the problem.
cuda::Config choose(const cuda::Problem& problem) {
  const char* given = std::getenv("EXLLAMA_OPS_CUDA_ALGORITHM");
  if (given == nullptr || *given == '\0') return cuda::select_gemm(problem);
  std::string names;
  for (const cuda::Gemm& gemm : cuda::Gemms::kAll) {
    names += (names.empty() ? "" : ", ") + std::string(gemm.name);
    if (std::strcmp(given, gemm.name) != 0) continue;
    if (gemm.can(problem)) return gemm.config(problem);
    throw std::invalid_argument(std::string("gptq_gemm: EXLLAMA_OPS_CUDA_ALGORITHM=") + given +
                                " cannot compute these arguments");
  }
  throw std::invalid_argument("gptq_gemm: EXLLAMA_OPS_CUDA_ALGORITHM must be one of " + names + "; got " + given);
}

torch::stable::Tensor new_reference(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.handle(), &handle));
  return torch::stable::Tensor(handle);
}

// a @ b, summed in float32, whatever the user allows BLAS to reduce in.
torch::stable::Tensor float32_product(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(a), from(b), from(torch::headeronly::ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack, TORCH_ABI_VERSION));
  return to<torch::stable::Tensor>(stack[0]);
}

// The columns of out from first_column on = x @ W, by chunks of columns that are rounded to x's dtype, and of them by
// rows of x.
void gemm_dense(const layout::Weight& weight, const Tensor& x, const Tensor& out, int64_t first_column,
                const cuda::Config& config, const Place& place) {
  using torch::stable::narrow;
  torch::stable::Tensor whole_x = new_reference(x), whole_out = new_reference(out);
  const int64_t M = x.size(0);
  for (int64_t first = 0; first < weight.N; first += config.chunk) {
    const int64_t columns = std::min(config.chunk, weight.N - first);
    const int64_t sizes[] = {weight.K, columns};
    const Tensor dense = Tensor::empty(sizes, x.dtype(), x.device_type(), x.device_index());
    cuda::dequantize(weight, first, columns, dense.data<void>(), dtype_of(x), place.stream());
    for (int64_t m = 0; m < M; m += config.rows) {
      const int64_t rows = std::min(config.rows, M - m);
      torch::stable::Tensor rows_of_out = narrow(whole_out, 0, m, rows);
      torch::stable::Tensor part = narrow(rows_of_out, 1, first_column + first, columns);
      torch::stable::copy_(part, float32_product(narrow(whole_x, 0, m, rows), new_reference(dense)));
    }
  }
}

// x times every part, side by side.
Tensor product(const layout::Weight* parts, int64_t count, const Tensor& x) {
  const int64_t M = x.size(0);
  const int64_t sizes[] = {M, layout::columns_of(parts, count)};
  Tensor out = Tensor::empty(sizes, x.dtype(), x.device_type(), x.device_index());
  if (M == 0) return out;
  const Place place(x);
  const cuda::Problem problem =
      cuda::problem_of(parts, count, dtype_of(x), M, place.device(), batch_invariant.load(std::memory_order_relaxed));
  const cuda::Config config = choose(problem);
  log_choice(problem, config);
  if (config.algorithm == cuda::Algorithm::kDense) {
    int64_t first_column = 0;
    for (const layout::Weight* part = parts; part != parts + count; first_column += part->N, ++part) {
      gemm_dense(*part, x, out, first_column, config, place);
    }
    return out;
  }
  const Workspace workspace(cuda::gemm_workspace_bytes(problem, config), x);
  cuda::gemm(parts, count, x.data<const void>(), dtype_of(x), M, out.data<void>(), config, workspace.get(),
             place.stream());
  return out;
}

void gptq_gemm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = tensor_at(stack, 0);
  const PackedWeight packed(stack + 1);
  const Shape shape = check_gptq_gemm(x, packed.arguments());
  const layout::Weight weight = packed.weight(shape);
  give_back(stack, product(&weight, 1, x));
}

void gptq_gemm_multi(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = tensor_at(stack, 0);
  const PackedWeights packed(stack + 1);
  const std::vector<layout::Weight> parts = packed.weights(packed.check(x), packed.options.rows());
  give_back(stack, product(parts.data(), static_cast<int64_t>(parts.size()), x));
}

void gptq_gemm_dx(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = tensor_at(stack, 0);
  const PackedWeight packed(stack + 1);
  const Shape shape = check_gptq_gemm_dx(grad, packed.arguments());
  const int64_t M = grad.size(0);
  const int64_t sizes[] = {M, shape.K};
  Tensor dx = Tensor::empty(sizes, grad.dtype(), grad.device_type(), grad.device_index());
  const Place place(grad);
  cuda::gemm_dx(packed.weight(shape), grad.data<const void>(), dtype_of(grad), M, dx.data<void>(), place.stream());
  give_back(stack, static_cast<Tensor&&>(dx));
}

void gptq_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  const PackedWeight packed(stack);
  const Shape shape = check_gptq_dequantize(packed.arguments());
  const int64_t sizes[] = {shape.K, shape.N};
  const Tensor& scales = packed.scales;
  Tensor out = Tensor::empty(sizes, scales.dtype(), scales.device_type(), scales.device_index());
  const Place place(scales);
  cuda::dequantize(packed.weight(shape), 0, shape.N, out.data<void>(), dtype_of(scales), place.stream());
  give_back(stack, static_cast<Tensor&&>(out));
}

const int32_t* perm_of(const Tensor& q_perm) {
  return q_perm.size(0) != 0 ? q_perm.data<const int32_t>() : nullptr;
}

void gptq_shuffle(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor qweight = tensor_at(stack, 0);
  const Tensor q_perm = tensor_at(stack, 1);
  const auto bit = to<int64_t>(stack[2]);
  const int64_t K = check_gptq_shuffle(qweight, q_perm, bit);
  const int64_t N = qweight.size(1);
  const auto bits = static_cast<int32_t>(bit);
  const int32_t* perm = perm_of(q_perm);
  const Place place(qweight);
  const Workspace workspace(cuda::shuffle_workspace_bytes(K, N, bits, perm != nullptr), qweight);
  cuda::shuffle(qweight.data<uint32_t>(), perm, K, N, bits, workspace.get(), place.stream());
}

void gptq_unshuffle(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor qweight = tensor_at(stack, 0);
  const Tensor q_perm = tensor_at(stack, 1);
  const auto bit = to<int64_t>(stack[2]);
  const int64_t K = check_gptq_unshuffle(qweight, q_perm, bit);
  const int64_t sizes[] = {qweight.size(0), qweight.size(1)};
  const int32_t* perm = perm_of(q_perm);
  Tensor out = Tensor::empty(sizes, kInt32, qweight.device_type(), qweight.device_index());
  const Place place(qweight);
  const Workspace workspace(cuda::unshuffle_workspace_bytes(K, perm != nullptr), qweight);
  cuda::unshuffle(qweight.data<const uint32_t>(), perm, K, sizes[1], static_cast<int32_t>(bit), out.data<uint32_t>(),
                  workspace.get(), place.stream());
  give_back(stack, static_cast<Tensor&&>(out));
}

}  // namespace
}  // namespace exllama::bindings

#define EXLLAMA_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel of one op, or of every op if `op` is null, in an operator namespace that has the schemas or will
// have them. Returns null, or what went wrong; the text lives until the thread's next call.
EXLLAMA_EXPORT const char* exllama_cuda_register(const char* name_space, const char* op) {
  using namespace exllama::bindings;
  return register_kernels({gptq_shuffle, gptq_unshuffle, gptq_dequantize, gptq_gemm, gptq_gemm_dx, gptq_gemm_multi},
                          name_space, op, kDispatchKey);
}

// Whether a row's bits must not depend on the rows that it is batched with.
EXLLAMA_EXPORT void exllama_cuda_set_batch_invariant(bool enabled) {
  exllama::bindings::batch_invariant.store(enabled, std::memory_order_relaxed);
}

EXLLAMA_EXPORT bool exllama_cuda_get_batch_invariant() {
  return exllama::bindings::batch_invariant.load(std::memory_order_relaxed);
}
