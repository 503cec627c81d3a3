// The CUDA kernels of the ops: plain pointers, sizes and a stream, no torch. Arguments were checked by the caller.
//
// All work is enqueued on the stream of the current device. Nothing waits, allocates or reads device memory, so
// that every function can be captured in a graph. A launch that fails throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout/weight.h"
#include "experts.h"
#include "select.h"

namespace exllama::cuda {

// A cudaStream_t.
using Stream = void*;

// The version of the CUDA runtime in this library, as 13000 for 13.0. A driver of an older major version runs nothing.
int32_t toolkit_version();

// Whether gemm's launches for few rows overlap with the kernel before them, where they can: overlap.h says how. At first
// they do not.
void set_launches_overlap(bool enabled);

// The properties of a CUDA device, which is asked once.
const Device& device_properties(int32_t index);

// Device memory that the caller lends until the work is done, aligned to 64 bytes.
size_t gemm_workspace_bytes(const Problem& problem, const Config& config);
size_t shuffle_workspace_bytes(int64_t K, int64_t N, int32_t bits, bool permuted);
size_t unshuffle_workspace_bytes(int64_t K, bool permuted);

// out (M, columns) = x (M, K) @ W of every part, side by side, both of dtype x_dtype. config is what select_gemm chose
// for the problem_of these arguments, which is that of one weight with the columns of all. Parts differ in their words,
// zero points, scales, N and scales_dtype alone. One launch has up to eight of them.
//
// Algorithm::kDense is not one launch: its caller dequantizes and multiplies by chunks of config.chunk columns.
//
// With experts, of whose stacks the one part is the first, each row has the weight of its expert; a row of none is 0.
// The same holds for the functions below that take them.
void gemm(const Weight* parts, int64_t count, const Experts& experts, const void* x, DType x_dtype, int64_t M,
          void* out, const Config& config, void* workspace, Stream stream);
Problem problem_of(const Weight* parts, int64_t count, const Experts& experts, DType x_dtype, int64_t M,
                   const Device& device, bool batch_invariant);

// dx (M, K) = grad (M, N) @ W^T, both of dtype grad_dtype, in float32 arithmetic.
void gemm_dx(const Weight& weight, const Experts& experts, const void* grad, DType grad_dtype, int64_t M, void* dx,
             Stream stream);

// out (K, columns) = the columns of W from first_column on, in out_dtype, with rows in the order of the checkpoint.
void dequantize(const Weight& weight, int64_t first_column, int64_t columns, void* out, DType out_dtype, Stream stream);

// out (M, K) = the columns of x that the rows of the words name. Weights without an order multiply it.
void gather_x(const Weight& weight, const Experts& experts, const void* x, DType dtype, int64_t M, void* out,
              Stream stream);

// A product with W^T by a BLAS that must not round W. limbs.h says what limbs are, and whether there are any.
//
// dequantize_limbs: out (limbs, rows, N) of 16 bits = the limbs of the rows of the words from first_row on.
// add_limbs: the columns of dx (M, K) that these are, by the float32 products (M, rows_of_w) with each limb.
// fill_dx: to be called before; it fills dx with NaN if the weight has an order.
void dequantize_limbs(const Weight& weight, int64_t first_row, int64_t rows, void* out, DType out_dtype, Stream stream);
void add_limbs(const Weight& weight, int64_t first_row, int64_t rows_of_w, const float* const* products, int64_t M,
               void* dx, DType dtype, Stream stream);
void fill_dx(const Weight& weight, DType dtype, int64_t M, void* dx, Stream stream);

// The kernels above take no filled weight, in which some rows name no column of x. They take the same words without an
// order, for an x that was gathered. These take from their results what belongs to a column of x. row_order has
// (K + in_features,) entries here: after what the rows name, the row of each column of x.
void gather_dx(const Weight& filled, const Experts& experts, const void* dx, DType dtype, int64_t M, void* out,
               Stream stream);
void gather_rows_of_w(const Weight& filled, const void* W, void* out, Stream stream);

// Brings qweight from checkpoint order into shuffled order, in place. perm is (K,) or null.
void shuffle(uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, void* workspace,
             Stream stream);

// Brings qweight from shuffled order into checkpoint order, in out.
void unshuffle(const uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, uint32_t* out,
               void* workspace, Stream stream);

}  // namespace exllama::cuda
