// Products by torch's BLAS with a W that was made for it, over torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "bindings/arguments.h"
#include "bindings/tensor.h"
#include "cuda/cuda.h"
#include "cuda/limbs.h"

namespace exllama::bindings {

inline torch::stable::Tensor new_reference(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.handle(), &handle));
  return torch::stable::Tensor(handle);
}

// a @ b, summed in float32, whatever the user allows BLAS to reduce in.
inline Tensor float32_product(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(a), from(b), from(torch::headeronly::ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack, TORCH_ABI_VERSION));
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

// out = a @ b, where BLAS sums in float32 and rounds once.
inline void product_rounded_once(const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                                 const torch::stable::Tensor& out) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  const Tensor same_as_out(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

// The columns of out from first_column on = x @ W. Each chunk of columns of W is rounded to x's dtype, and multiplied with
// some rows of x at a time. If BLAS rounds float32 sums once, it writes the result, and else a copy rounds it.
inline void gemm_dense(const layout::Weight& weight, const Tensor& x, const Tensor& out, int64_t first_column,
                       const cuda::Config& config, bool blas_rounds_once, cuda::Stream stream) {
  using torch::stable::narrow;
  torch::stable::Tensor whole_x = new_reference(x), whole_out = new_reference(out);
  const int64_t M = x.size(0);
  for (int64_t first = 0; first < weight.N; first += config.chunk) {
    const int64_t columns = std::min(config.chunk, weight.N - first);
    const int64_t sizes[] = {weight.K, columns};
    const Tensor dense = Tensor::empty(sizes, x.dtype(), x);
    cuda::dequantize(weight, first, columns, dense.data<void>(), dtype_of(x), stream);
    for (int64_t m = 0; m < M; m += config.rows) {
      const int64_t rows = std::min(config.rows, M - m);
      torch::stable::Tensor rows_of_out = narrow(whole_out, 0, m, rows);
      torch::stable::Tensor part = narrow(rows_of_out, 1, first_column + first, columns);
      const torch::stable::Tensor rows_of_x = narrow(whole_x, 0, m, rows);
      if (blas_rounds_once) {
        product_rounded_once(rows_of_x, new_reference(dense), part);
      } else {
        torch::stable::copy_(part, new_reference(float32_product(rows_of_x, new_reference(dense))));
      }
    }
  }
}

// dx = grad @ W^T. A chunk of rows of W is made of its limbs, which are multiplied with some rows of grad at a time.
inline void gemm_dx_dense(const layout::Weight& weight, const Tensor& grad, const Tensor& dx,
                          const cuda::Config& config, cuda::Stream stream) {
  using torch::stable::narrow;
  const layout::DType dtype = dtype_of(grad);
  const int64_t M = grad.size(0), limbs = cuda::limbs_of(dtype, weight.scales_dtype, weight.bits).count;
  torch::stable::Tensor whole_grad = new_reference(grad);
  cuda::fill_dx(weight, dtype, M, dx.data<void>(), stream);
  for (int64_t first = 0; first < weight.K; first += config.chunk) {
    const int64_t rows_of_w = std::min(config.chunk, weight.K - first);
    const int64_t sizes[] = {limbs * rows_of_w, weight.N};
    const Tensor of_limbs = Tensor::empty(sizes, grad.dtype(), grad);
    cuda::dequantize_limbs(weight, first, rows_of_w, of_limbs.data<void>(), dtype, stream);
    torch::stable::Tensor whole_limbs = new_reference(of_limbs);
    for (int64_t m = 0; m < M; m += config.rows) {
      const int64_t rows = std::min(config.rows, M - m);
      Tensor products[cuda::kMaxLimbs];
      const float* pointers[cuda::kMaxLimbs] = {};
      for (int64_t limb = 0; limb < limbs; ++limb) {
        const torch::stable::Tensor of_limb = narrow(whole_limbs, 0, limb * rows_of_w, rows_of_w);
        products[limb] = float32_product(narrow(whole_grad, 0, m, rows), torch::stable::transpose(of_limb, 0, 1));
        pointers[limb] = products[limb].data<const float>();
      }
      auto* const rows_of_dx = static_cast<char*>(dx.data<void>()) + m * weight.K * layout::bytes_of(dtype);
      cuda::add_limbs(weight, first, rows_of_w, pointers, rows, rows_of_dx, dtype, stream);
    }
  }
}

}  // namespace exllama::bindings
