// The CPU kernels as implementations of the ops, over torch's stable ABI: checks, memory, threads, registration.
//
// Loading the library has no effect; exllama_cpu_register gives ops their kernels, so that a library which is built
// while an op has its one kernel already can serve under a second namespace. Schemas are defined by Python.

#include <pthread.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/registration.h"
#include "cpu/cpu.h"

namespace exllama::bindings {
namespace {

using torch::stable::detail::to;

std::atomic<int32_t> matmul_precision{static_cast<int32_t>(cpu::Precision::kHigh)};

// The threads of torch's own pool. torch_parallel_for runs inline in a nested region and with one thread, and gives
// each thread one index otherwise; what a thread does then is claim tasks until none is left.
//
// A child of fork has none of the pool's threads, for which torch would wait without end; it takes threads of its own.
class TorchThreads {
 public:
  TorchThreads() { TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads_)); }

  int32_t threads() const { return static_cast<int32_t>(threads_); }
  cpu::Parallel parallel() { return {&TorchThreads::run, this, threads()}; }

 private:
  struct Job {
    std::atomic<int64_t> next;
    int64_t tasks;
    cpu::Parallel::Body body;
    void* context;
  };

  static void run(void* self, int64_t tasks, cpu::Parallel::Body body, void* context) {
    const int64_t threads = static_cast<TorchThreads*>(self)->threads_;
    const int64_t workers = threads < tasks ? threads : tasks;
    if (workers <= 1) {
      for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
      return;
    }
    Job job{{0}, tasks, body, context};
    if (in_child_.load(std::memory_order_relaxed)) return run_without_pool(job, workers);
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, &TorchThreads::work, &job));
  }

  static void run_without_pool(Job& job, int64_t workers) {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(workers));
    try {
      for (int64_t index = 1; index < workers; ++index) others.emplace_back(&TorchThreads::work, index, 0, &job);
    } catch (const std::system_error&) {
      // The system gives no more threads; those that are there claim all tasks.
    }
    work(0, 0, &job);
    for (std::thread& thread : others) thread.join();
  }

  static void work(int64_t index, int64_t, void* context) {
    Job& job = *static_cast<Job*>(context);
    const auto worker = static_cast<int32_t>(index);
    // Relaxed: the counter only hands out numbers; the pool's fork and join order the memory around it.
    for (int64_t task = job.next.fetch_add(1, std::memory_order_relaxed); task < job.tasks;
         task = job.next.fetch_add(1, std::memory_order_relaxed)) {
      job.body(job.context, task, worker);
    }
  }

  static inline std::atomic<bool> in_child_{false};
  static inline const int at_fork_ = pthread_atfork(nullptr, nullptr, [] { in_child_ = true; });

  uint32_t threads_ = 1;
};

// Scratch memory of a product: on the stack if it is little, since an allocation is a tenth of the shortest call.
class ProductWorkspace {
 public:
  ProductWorkspace(size_t bytes, const Tensor& like)
      : large_(bytes > sizeof small_ ? bytes : 0, like), pointer_(bytes > sizeof small_ ? large_.get() : small_) {}
  ProductWorkspace(const ProductWorkspace&) = delete;
  ProductWorkspace& operator=(const ProductWorkspace&) = delete;
  void* get() const { return pointer_; }

 private:
  alignas(64) char small_[16 << 10];
  Workspace large_;
  void* pointer_;
};

// A name that the user gave and that no ISA has is refused, so that another one does not pass for it.
void check_isa(const char* op) {
  if (cpu::isa_in_use() != nullptr) return;
  std::string available;
  for (const char* const* name = cpu::isa_names(); *name != nullptr; ++name) {
    if (cpu::isa_available(*name)) available += (available.empty() ? "" : ", ") + std::string(*name);
  }
  const char* given = std::getenv("EXLLAMA_OPS_CPU_ISA");
  throw std::invalid_argument(std::string(op) + ": EXLLAMA_OPS_CPU_ISA must name an instruction set of this CPU, one of " +
                              available + "; got " + (given != nullptr ? given : ""));
}

// A copy of an index that has passed the checks of its values. Kernels read the copy, so that no thread can change what
// was checked.
class CheckedIndex {
 public:
  // `permutation`: no value may come twice.
  CheckedIndex(const char* op, const char* name, const Tensor& index, int64_t limit, bool permutation)
      : large_(index.size(0) > kSmall ? bytes_of(index) : 0, index) {
    const int64_t entries = index.size(0);
    if (entries == 0) return;
    values_ = entries > kSmall ? static_cast<int32_t*>(large_.get()) : small_;
    std::memcpy(values_, index.data<const void>(), bytes_of(index));
    check_index_range(op, name, values_, entries, limit);
    if (!permutation) return;
    const Workspace seen(static_cast<size_t>(entries), index);
    check_permutation(op, name, values_, entries, static_cast<uint8_t*>(seen.get()));
  }
  CheckedIndex(const CheckedIndex&) = delete;
  CheckedIndex& operator=(const CheckedIndex&) = delete;
  // Null for an empty index.
  const int32_t* get() const { return values_; }

 private:
  static constexpr int64_t kSmall = 4096;

  static size_t bytes_of(const Tensor& index) { return static_cast<size_t>(index.size(0)) * sizeof(int32_t); }

  int32_t small_[kSmall];
  Workspace large_;
  int32_t* values_ = nullptr;
};

// The permutation or the groups of a weight's rows; an op that writes to the rows of a permutation needs each of them.
CheckedIndex checked_rows(const char* op, const Options& options, const Shape& shape, bool writes_to_its_rows) {
  return {op, "g_idx", options.g_idx, options.use_exllama ? shape.K : shape.G,
          options.use_exllama && writes_to_its_rows};
}

// x times every part, side by side.
Tensor product(const cpu::Weight* parts, int64_t count, const Tensor& x) {
  const int64_t M = x.size(0);
  const int64_t sizes[] = {M, layout::columns_of(parts, count)};
  Tensor out = Tensor::empty(sizes, x.dtype(), x.device_type(), x.device_index());
  if (M > 0) {
    TorchThreads pool;
    const auto precision = static_cast<cpu::Precision>(matmul_precision.load(std::memory_order_relaxed));
    const size_t bytes = cpu::gemm_workspace_bytes(parts, count, M, precision, pool.threads());
    const ProductWorkspace workspace(bytes, x);
    cpu::gemm(parts, count, x.data<const void>(), dtype_of(x), M, out.data<void>(), precision, workspace.get(),
              pool.parallel());
  }
  return out;
}

void gptq_gemm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = tensor_at(stack, 0);
  const PackedWeight packed(stack + 1);
  const Shape shape = check_gptq_gemm(x, packed.arguments());
  check_isa("gptq_gemm");
  const CheckedIndex rows = checked_rows("gptq_gemm", packed.options, shape, false);
  const cpu::Weight weight = packed.weight(shape, rows.get());
  give_back(stack, product(&weight, 1, x));
}

void gptq_gemm_multi(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = tensor_at(stack, 0);
  const PackedWeights packed(stack + 1);
  const std::vector<Shape> shapes = packed.check(x);
  check_isa("gptq_gemm_multi");
  const CheckedIndex rows = checked_rows("gptq_gemm_multi", packed.options, shapes[0], false);
  const std::vector<cpu::Weight> parts = packed.weights(shapes, rows.get());
  give_back(stack, product(parts.data(), static_cast<int64_t>(parts.size()), x));
}

void gptq_gemm_dx(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = tensor_at(stack, 0);
  const PackedWeight packed(stack + 1);
  const Shape shape = check_gptq_gemm_dx(grad, packed.arguments());
  check_isa("gptq_gemm_dx");
  const CheckedIndex rows = checked_rows("gptq_gemm_dx", packed.options, shape, true);
  const cpu::Weight weight = packed.weight(shape, rows.get());
  const int64_t M = grad.size(0);
  const int64_t sizes[] = {M, shape.K};
  Tensor dx = Tensor::empty(sizes, grad.dtype(), grad.device_type(), grad.device_index());
  if (M > 0) {
    TorchThreads pool;
    const ProductWorkspace workspace(cpu::gemm_dx_workspace_bytes(weight, M, pool.threads()), grad);
    cpu::gemm_dx(weight, grad.data<const void>(), dtype_of(grad), M, dx.data<void>(), workspace.get(),
                 pool.parallel());
  }
  give_back(stack, static_cast<Tensor&&>(dx));
}

void gptq_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  const PackedWeight packed(stack);
  const Shape shape = check_gptq_dequantize(packed.arguments());
  check_isa("gptq_dequantize");
  const CheckedIndex rows = checked_rows("gptq_dequantize", packed.options, shape, true);
  const cpu::Weight weight = packed.weight(shape, rows.get());
  const int64_t sizes[] = {shape.K, shape.N};
  const Tensor& scales = packed.scales;
  Tensor out = Tensor::empty(sizes, scales.dtype(), scales.device_type(), scales.device_index());
  TorchThreads pool;
  cpu::dequantize(weight, out.data<void>(), pool.parallel());
  give_back(stack, static_cast<Tensor&&>(out));
}

void gptq_shuffle(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor qweight = tensor_at(stack, 0);
  const Tensor q_perm = tensor_at(stack, 1);
  const auto bit = to<int64_t>(stack[2]);
  const int64_t K = check_gptq_shuffle(qweight, q_perm, bit);
  const int64_t N = qweight.size(1);
  check_isa("gptq_shuffle");
  const CheckedIndex perm("gptq_shuffle", "q_perm", q_perm, K, true);
  if (N == 0) return;
  const auto bits = static_cast<int32_t>(bit);
  TorchThreads pool;
  const Workspace workspace(cpu::shuffle_workspace_bytes(K, N, bits, perm.get() != nullptr), qweight);
  cpu::shuffle(qweight.data<uint32_t>(), perm.get(), K, N, bits, workspace.get(), pool.parallel());
}

void gptq_unshuffle(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor qweight = tensor_at(stack, 0);
  const Tensor q_perm = tensor_at(stack, 1);
  const auto bit = to<int64_t>(stack[2]);
  const int64_t K = check_gptq_unshuffle(qweight, q_perm, bit);
  const int64_t sizes[] = {qweight.size(0), qweight.size(1)};
  check_isa("gptq_unshuffle");
  const CheckedIndex perm("gptq_unshuffle", "q_perm", q_perm, K, true);
  Tensor out = Tensor::empty(sizes, kInt32, qweight.device_type(), qweight.device_index());
  if (sizes[1] > 0) {
    TorchThreads pool;
    cpu::unshuffle(qweight.data<const uint32_t>(), perm.get(), K, sizes[1], static_cast<int32_t>(bit),
                   out.data<uint32_t>(), pool.parallel());
  }
  give_back(stack, static_cast<Tensor&&>(out));
}

}  // namespace
}  // namespace exllama::bindings

#define EXLLAMA_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel of one op for CPU tensors, or of every op if `op` is null, in an operator namespace that has the
// schemas or will have them. Returns null, or what went wrong; the text lives until the thread's next call.
EXLLAMA_EXPORT const char* exllama_cpu_register(const char* name_space, const char* op) {
  using namespace exllama::bindings;
  return register_kernels({gptq_shuffle, gptq_unshuffle, gptq_dequantize, gptq_gemm, gptq_gemm_dx, gptq_gemm_multi},
                          name_space, op, "CPU");
}

// The values are those of exllama::cpu::Precision; whoever calls has checked them.
EXLLAMA_EXPORT void exllama_cpu_set_matmul_precision(int32_t precision) {
  exllama::bindings::matmul_precision.store(precision, std::memory_order_relaxed);
}

EXLLAMA_EXPORT int32_t exllama_cpu_get_matmul_precision() {
  return exllama::bindings::matmul_precision.load(std::memory_order_relaxed);
}

// The table of instruction sets: name by index, best first, null after the last.
EXLLAMA_EXPORT const char* exllama_cpu_isa_name(int32_t index) {
  const char* const* names = exllama::cpu::isa_names();
  for (int32_t i = 0; i <= index; ++i) {
    if (names[i] == nullptr) return nullptr;
  }
  return names[index];
}

EXLLAMA_EXPORT bool exllama_cpu_isa_available(const char* name) { return exllama::cpu::isa_available(name); }

// Null if EXLLAMA_OPS_CPU_ISA names none that this CPU has.
EXLLAMA_EXPORT const char* exllama_cpu_isa_in_use() { return exllama::cpu::isa_in_use(); }

// The best if the name is empty.
EXLLAMA_EXPORT void exllama_cpu_use_isa(const char* name) { exllama::cpu::use_isa(name); }
