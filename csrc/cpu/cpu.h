// The CPU kernels of the ops: plain pointers and sizes, no torch. Arguments were checked by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/weight.h"

namespace exllama::cpu {

using layout::DType;
using layout::Weight;

// How exactly gemm multiplies; the bounds are those of exllama_ops.set_cpu_matmul_precision.
enum class Precision : int32_t { kHighest = 0, kHigh = 1, kMedium = 2 };

// Runs body(context, task, worker) for every task in [0, tasks), in any order, on any threads, and returns when all are
// done. Tasks that run at the same time have different workers in [0, threads). Threads claim tasks one at a time, so
// that a stolen core delays one task and not half of them.
struct Parallel {
  using Body = void (*)(void* context, int64_t task, int32_t worker);
  void (*run)(void* self, int64_t tasks, Body body, void* context);
  void* self;
  int32_t threads;
  // How many of so many threads would begin at once; null if all would.
  int32_t (*ready)(void* self, int32_t threads) = nullptr;
};

// Scratch memory, 64-byte aligned, valid until the op returns; the caller owns it and sizes it by *_workspace_bytes.
size_t gemm_workspace_bytes(const Weight* parts, int64_t count, int64_t M, Precision precision, int32_t threads);
size_t gemm_dx_workspace_bytes(const Weight& weight, int64_t M, int32_t threads);
size_t shuffle_workspace_bytes(int64_t K, int32_t bits, int32_t threads);

// out (M, N of all parts) = x (M, in_features) @ W of each part, side by side, all of dtype x_dtype. The parts, at least
// one, have everything but N, their data and the dtype of their scales in common.
void gemm(const Weight* parts, int64_t count, const void* x, DType x_dtype, int64_t M, void* out, Precision precision,
          void* workspace, const Parallel& parallel);

// One of several weights of one shape and format, and the rows of x that it has.
struct Expert {
  Weight weight;
  int64_t first_row;
  int64_t rows;  // at least one
};

// gemm and gemm_dx of the rows of each expert by its weight, with the same bits. x and out have the rows of all experts.
// There is at least one expert.
size_t moe_gemm_workspace_bytes(const Expert* experts, int64_t count, Precision precision, int32_t threads);
void moe_gemm(const Expert* experts, int64_t count, const void* x, DType x_dtype, void* out, Precision precision,
              void* workspace, const Parallel& parallel);
size_t moe_gemm_dx_workspace_bytes(const Expert* experts, int64_t count, int32_t threads);
void moe_gemm_dx(const Expert* experts, int64_t count, const void* grad, DType grad_dtype, void* dx, void* workspace,
                 const Parallel& parallel);

// dx (M, in_features) = grad (M, N) @ W^T, both of dtype grad_dtype, in float32 arithmetic.
void gemm_dx(const Weight& weight, const void* grad, DType grad_dtype, int64_t M, void* dx, void* workspace,
             const Parallel& parallel);

// out (in_features, N) in the scales' dtype, rows in the order of the checkpoint.
void dequantize(const Weight& weight, void* out, const Parallel& parallel);

// Checkpoint order to shuffled order in place; perm (K,) or null.
void shuffle(uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, void* workspace,
             const Parallel& parallel);

// Shuffled order to checkpoint order in out.
void unshuffle(const uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, uint32_t* out,
               void* workspace, const Parallel& parallel);

// The instruction sets that kernels exist for, best first, "scalar" last, null-terminated.
const char* const* isa_names();
// Whether this CPU has one of them.
bool isa_available(const char* name);
// The one in use: what EXLLAMA_OPS_CPU_ISA names at first, or the best available; null if none has that name.
const char* isa_in_use();
// Uses one from now on, the best if the name is empty or null.
void use_isa(const char* name);

}  // namespace exllama::cpu
