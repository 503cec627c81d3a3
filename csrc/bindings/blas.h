// What the user of torch lets its BLAS do, of which torch's stable ABI says nothing.
//
// The functions are those of at::Context by their names in the ABI of C++, where `this` is the first argument. They are
// weak. A torch that has other names for them counts as one that refuses, and `dense` is left out of the choice.
#pragma once

#include <cstdint>

namespace exllama::bindings::blas {

const void* global_context() __asm__("_ZN2at13globalContextEv") __attribute__((weak));
bool allows_fp16_accumulation(const void* context) __asm__("_ZNK2at7Context27allowFP16AccumulationCuBLASEv")
    __attribute__((weak));
bool wants_determinism(const void* context) __asm__("_ZNK2at7Context23deterministicAlgorithmsEv") __attribute__((weak));

// What the next two return has had two meanings. This setter of two arguments is in those that mean: 0 for a reduction in
// 16 bits.
void set_fp16_reduction(void* context, bool, bool) __asm__("_ZN2at7Context27setAllowFP16ReductionCuBLASEbb")
    __attribute__((weak));
uint8_t fp16_reduction(const void* context) __asm__("_ZNK2at7Context24allowFP16ReductionCuBLASEv")
    __attribute__((weak));
uint8_t bf16_reduction(const void* context) __asm__("_ZNK2at7Context24allowBF16ReductionCuBLASEv")
    __attribute__((weak));

// torch.backends.cuda.matmul.allow_fp16_accumulation, under which no product of float16 has a float32 result.
inline bool fp16_accumulation() {
  if (global_context == nullptr || allows_fp16_accumulation == nullptr) return true;
  return allows_fp16_accumulation(global_context());
}

// torch.use_deterministic_algorithms, under which torch refuses its BLAS without a certain CUBLAS_WORKSPACE_CONFIG.
inline bool deterministic() {
  if (global_context == nullptr || wants_determinism == nullptr) return true;
  return wants_determinism(global_context());
}

// Not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, or its twin for bfloat16: whether sums that a
// BLAS has split are added up in float32, and rounded once.
inline bool reduces_in_float32(bool is_bfloat16) {
  if (global_context == nullptr || set_fp16_reduction == nullptr) return false;
  const auto reduction = is_bfloat16 ? bf16_reduction : fp16_reduction;
  return reduction != nullptr && reduction(global_context()) != 0;
}

}  // namespace exllama::bindings::blas
