// The CPU kernels as implementations of the ops, over torch's stable ABI: checks, memory, threads, registration.
//
// Loading the library has no effect; exllama_cpu_register gives ops their kernels. So a library that is built while an op
// has its one kernel already can serve under a second namespace. Schemas are defined by Python.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/registration.h"
#include "bindings/workspace.h"
#include "cpu/cpu.h"
#include "cpu/workers.h"

namespace exllama::bindings {
namespace {

std::atomic<int32_t> matmul_precision{static_cast<int32_t>(cpu::Precision::kHigh)};

// As many threads as torch may use. Below the first thread of one of torch's parallel regions it is one: the others have
// their share already.
class TorchThreads {
 public:
  TorchThreads() {
    uint32_t index = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
    if (index == 0) TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads_));
  }

  int32_t threads() const { return static_cast<int32_t>(threads_); }
  cpu::Parallel parallel() { return {&TorchThreads::run, this, threads(), &TorchThreads::ready}; }

 private:
  static void run(void* self, int64_t tasks, cpu::Parallel::Body body, void* context) {
    cpu::Workers::of_process().run(tasks, body, context, static_cast<TorchThreads*>(self)->threads());
  }

  static int32_t ready(void*, int32_t threads) { return cpu::Workers::of_process().ready(threads); }

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
  throw std::invalid_argument(std::string(op) +
                              ": EXLLAMA_OPS_CPU_ISA must name an instruction set of this CPU, one of " + available +
                              "; got " + (given != nullptr ? given : ""));
}

// A copy of an index that has passed the checks of its values. Kernels read the copy, so that no thread can change what
// was checked.
class CheckedIndex {
 public:
  // `permutation`: no value may come twice.
  CheckedIndex(const char* op, const char* name, const Tensor& index, int64_t limit, bool permutation)
      : CheckedIndex(index, index.size(0)) {
    const int64_t entries = index.size(0);
    if (entries == 0) return;
    check_index_range(op, name, values_, entries, limit);
    if (!permutation) return;
    const Workspace seen(static_cast<size_t>(entries), index);
    check_permutation(op, name, values_, entries, static_cast<uint8_t*>(seen.get()));
  }
  // Kernels take what the rows name. Where each row of W stands is known by that.
  CheckedIndex(const char* op, const Tensor& g_idx, const Shape& shape) : CheckedIndex(g_idx, shape.K) {
    check_filled_order(op, "g_idx", values_, g_idx.data<const int32_t>() + shape.K, shape.K, shape.in_features);
  }
  CheckedIndex(const CheckedIndex&) = delete;
  CheckedIndex& operator=(const CheckedIndex&) = delete;
  // Null for an empty index.
  const int32_t* get() const { return values_; }

 private:
  static constexpr int64_t kSmall = 4096;

  // The first `entries` entries, not checked yet.
  CheckedIndex(const Tensor& index, int64_t entries)
      : large_(entries > kSmall ? static_cast<size_t>(entries) * sizeof(int32_t) : 0, index) {
    if (entries == 0) return;
    values_ = entries > kSmall ? static_cast<int32_t*>(large_.get()) : small_;
    std::memcpy(values_, index.data<const void>(), static_cast<size_t>(entries) * sizeof(int32_t));
  }

  int32_t small_[kSmall];
  Workspace large_;
  int32_t* values_ = nullptr;
};

// Copies of the offsets of the experts, and of the orders of those that have rows: checked, as a CheckedIndex is.
class CheckedExperts {
 public:
  CheckedExperts(const char* op, const ExpertsArguments& arguments, const Shape& shape, const Tensor& rows,
                 bool writes_to_its_rows)
      : arguments_(arguments), shape_(shape), M_(rows.size(0)) {
    const int64_t E = arguments.qweight.size(0);
    const auto* given = arguments.offsets.data<const int32_t>();
    offsets_.assign(given, given + E + 1);
    check_expert_offsets(op, offsets_.data(), E + 1, M_);
    for (int64_t expert = 0; expert < E; ++expert) {
      if (offsets_[expert] < offsets_[expert + 1]) with_rows_.push_back(expert);
    }
    if (arguments.ordered()) copy_orders(op, writes_to_its_rows);
  }

  // The experts that have rows, with their weights.
  std::vector<cpu::Expert> get() const {
    std::vector<cpu::Expert> experts;
    experts.reserve(with_rows_.size());
    for (size_t i = 0; i < with_rows_.size(); ++i) {
      const int64_t expert = with_rows_[i];
      const int32_t* order = orders_.empty() ? nullptr : orders_.data() + static_cast<int64_t>(i) * shape_.K;
      experts.push_back(
          {arguments_.weight(expert, shape_, order), offsets_[expert], offsets_[expert + 1] - offsets_[expert]});
    }
    return experts;
  }

  // Zeros into the rows of a result that no expert has: those before the first offset, and from the last one on.
  void clear_the_rest(const Tensor& result) const {
    const int64_t row_bytes = result.size(1) * layout::bytes_of(dtype_of(result));
    auto* begin = result.data<char>();
    std::memset(begin, 0, static_cast<size_t>(offsets_.front() * row_bytes));
    std::memset(begin + offsets_.back() * row_bytes, 0, static_cast<size_t>((M_ - offsets_.back()) * row_bytes));
  }

 private:
  void copy_orders(const char* op, bool writes_to_its_rows) {
    const Tensor& g_idx = arguments_.options.g_idx;
    const int64_t entries = g_idx.size(1), limit = arguments_.options.use_exllama ? shape_.K : shape_.G;
    std::vector<uint8_t> seen(static_cast<size_t>(shape_.K));
    orders_.resize(with_rows_.size() * static_cast<size_t>(shape_.K));
    for (size_t i = 0; i < with_rows_.size(); ++i) {
      const int64_t expert = with_rows_[i];
      const auto* given = g_idx.data<const int32_t>() + expert * entries;
      int32_t* order = orders_.data() + static_cast<int64_t>(i) * shape_.K;
      std::copy(given, given + shape_.K, order);
      const std::string name = "g_idx[" + std::to_string(expert) + "]";
      if (shape_.filled) {
        check_filled_order(op, name, order, given + shape_.K, shape_.K, shape_.in_features);
        continue;
      }
      check_index_range(op, name, order, shape_.K, limit);
      if (arguments_.options.use_exllama && writes_to_its_rows) {
        check_permutation(op, name, order, shape_.K, seen.data());
      }
    }
  }

  const ExpertsArguments& arguments_;
  const Shape shape_;
  const int64_t M_;
  std::vector<int32_t> offsets_;
  std::vector<int64_t> with_rows_;
  std::vector<int32_t> orders_;  // [expert with rows][row of the words]
};

// What Ops asks of a device.
struct Cpu {
  using Index = CheckedIndex;

  static void check(const char* op) { check_isa(op); }

  static void gemm(const cpu::Weight* parts, int64_t count, const Tensor& x, const Tensor& out) {
    TorchThreads pool;
    const int64_t M = x.size(0);
    const auto precision = static_cast<cpu::Precision>(matmul_precision.load(std::memory_order_relaxed));
    const ProductWorkspace workspace(cpu::gemm_workspace_bytes(parts, count, M, precision, pool.threads()), x);
    cpu::gemm(parts, count, x.data<const void>(), dtype_of(x), M, out.data<void>(), precision, workspace.get(),
              pool.parallel());
  }

  static void gemm_dx(const cpu::Weight& weight, const Tensor& grad, const Tensor& dx) {
    TorchThreads pool;
    const int64_t M = grad.size(0);
    const ProductWorkspace workspace(cpu::gemm_dx_workspace_bytes(weight, M, pool.threads()), grad);
    cpu::gemm_dx(weight, grad.data<const void>(), dtype_of(grad), M, dx.data<void>(), workspace.get(), pool.parallel());
  }

  static void moe_gemm(const ExpertsArguments& arguments, const Shape& shape, const Tensor& x, const Tensor& out) {
    TorchThreads pool;
    const CheckedExperts checked("gptq_moe_gemm", arguments, shape, x, false);
    const std::vector<cpu::Expert> experts = checked.get();
    checked.clear_the_rest(out);
    if (experts.empty()) return;
    const auto count = static_cast<int64_t>(experts.size());
    const auto precision = static_cast<cpu::Precision>(matmul_precision.load(std::memory_order_relaxed));
    const size_t bytes = cpu::moe_gemm_workspace_bytes(experts.data(), count, precision, pool.threads());
    const ProductWorkspace workspace(bytes, x);
    cpu::moe_gemm(experts.data(), count, x.data<const void>(), dtype_of(x), out.data<void>(), precision,
                  workspace.get(), pool.parallel());
  }

  static void moe_gemm_dx(const ExpertsArguments& arguments, const Shape& shape, const Tensor& grad, const Tensor& dx) {
    TorchThreads pool;
    const CheckedExperts checked("gptq_moe_gemm_dx", arguments, shape, grad, true);
    const std::vector<cpu::Expert> experts = checked.get();
    checked.clear_the_rest(dx);
    if (experts.empty()) return;
    const auto count = static_cast<int64_t>(experts.size());
    const ProductWorkspace workspace(cpu::moe_gemm_dx_workspace_bytes(experts.data(), count, pool.threads()), grad);
    cpu::moe_gemm_dx(experts.data(), count, grad.data<const void>(), dtype_of(grad), dx.data<void>(), workspace.get(),
                     pool.parallel());
  }

  static void dequantize(const cpu::Weight& weight, const Tensor& out) {
    TorchThreads pool;
    cpu::dequantize(weight, out.data<void>(), pool.parallel());
  }

  static void shuffle(const Tensor& qweight, const int32_t* perm, int64_t K, int32_t bits) {
    TorchThreads pool;
    const Workspace workspace(cpu::shuffle_workspace_bytes(K, bits, pool.threads()), qweight);
    cpu::shuffle(qweight.data<uint32_t>(), perm, K, qweight.size(1), bits, workspace.get(), pool.parallel());
  }

  static void unshuffle(const Tensor& qweight, const int32_t* perm, int64_t K, int32_t bits, const Tensor& out) {
    TorchThreads pool;
    const Workspace workspace(cpu::shuffle_workspace_bytes(K, bits, pool.threads()), qweight);
    cpu::unshuffle(qweight.data<const uint32_t>(), perm, K, qweight.size(1), bits, out.data<uint32_t>(),
                   workspace.get(), pool.parallel());
  }
};

}  // namespace
}  // namespace exllama::bindings

#define EXLLAMA_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel of one op for CPU tensors, or of every op if `op` is null. The operator namespace has the schemas
// or will have them. Returns null, or what went wrong; the text lives until the thread's next call.
EXLLAMA_EXPORT const char* exllama_cpu_register(const char* name_space, const char* op) {
  using namespace exllama::bindings;
  return register_kernels(kImplementations<Cpu>, name_space, op, "CPU");
}

// What `op` may be: name by index, null after the last.
EXLLAMA_EXPORT const char* exllama_cpu_op_name(int32_t index) {
  using namespace exllama::bindings;
  return op_name(kImplementations<Cpu>, index);
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
