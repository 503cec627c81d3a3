// The schemas of the ops, for programs without Python, over torch's stable ABI.
//
// In a Python process exllama_ops defines them, with the tags that Inductor asks for; they are compared by a test.
// Loading the library has no effect; exllama_define_ops defines the ops, which then wait for the kernels of a device.

#include <atomic>
#include <exception>
#include <string>

#include "bindings/library.h"

namespace {

#define OPTIONS "Tensor g_idx, bool use_exllama, int bit, bool use_v2_format=False, int group_size=0"
#define WEIGHT_ARGUMENTS "Tensor qweight, Tensor qzeros, Tensor scales, " OPTIONS
#define MULTI_ARGUMENTS "Tensor[] qweight, Tensor[] qzeros, Tensor[] scales, " OPTIONS
#define EXPERTS_ARGUMENTS                                                                                          \
  "Tensor qweight, Tensor qzeros, Tensor scales, Tensor g_idx, Tensor expert_offsets, bool use_exllama, int bit, " \
  "bool use_v2_format=False, int group_size=0"

const char* const kSchemas[] = {
    "gptq_shuffle(Tensor(a!) qweight, Tensor q_perm, int bit) -> ()",
    "gptq_unshuffle(Tensor qweight, Tensor q_perm, int bit) -> Tensor",
    "gptq_dequantize(" WEIGHT_ARGUMENTS ") -> Tensor",
    "gptq_gemm(Tensor x, " WEIGHT_ARGUMENTS ") -> Tensor",
    "gptq_gemm.no_autograd(Tensor x, " WEIGHT_ARGUMENTS ") -> Tensor",
    "gptq_gemm_multi(Tensor x, " MULTI_ARGUMENTS ") -> Tensor",
    "gptq_gemm_multi.no_autograd(Tensor x, " MULTI_ARGUMENTS ") -> Tensor",
    "gptq_moe_gemm(Tensor x, " EXPERTS_ARGUMENTS ") -> Tensor",
    "gptq_moe_gemm.no_autograd(Tensor x, " EXPERTS_ARGUMENTS ") -> Tensor",
    "gptq_moe_gemm_dx(Tensor grad, " EXPERTS_ARGUMENTS ") -> Tensor",
    "gptq_moe_gemm_dx.no_autograd(Tensor grad, " EXPERTS_ARGUMENTS ") -> Tensor",
    "gptq_gemm_dx(Tensor grad, " WEIGHT_ARGUMENTS ") -> Tensor",
    "gptq_gemm_dx.no_autograd(Tensor grad, " WEIGHT_ARGUMENTS ") -> Tensor",
};

}  // namespace

// Never to be called beside exllama_ops: a namespace has one owner, and torch ends a process in which a second library
// defines it. Returns null, or what went wrong; the text lives until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* exllama_define_ops() {
  static std::atomic<bool> defined{false};
  if (defined.exchange(true)) return "the ops of the namespace exllama are defined already";
  static thread_local std::string error;
  try {
    exllama::bindings::Library library("exllama");
    for (const char* schema : kSchemas) library.define(schema);
    library.keep();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    defined = false;
  }
  return error.c_str();
}
