// The boxed kernels of the ops, written once for every device: arguments, checks, result.
//
// A Device computes with plain pointers. It has
//   check(op)                                      throws if it cannot compute anything
//   Index(op, name, tensor, limit, permutation)    whose get() is where the values of an index lie, checked if the device
//                                                  can do that; null if it is empty
//   Index(op, tensor, shape)                       likewise of the g_idx of a filled weight, by its rows
//   gemm, gemm_dx, dequantize, shuffle, unshuffle  which are called where there is something to compute
//   moe_gemm, moe_gemm_dx                          which also check the values of offsets and orders, if the device can
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/registration.h"
#include "bindings/tensor.h"
#include "layout/weight.h"

namespace exllama::bindings {

template <typename Device>
struct Ops {
  using Index = typename Device::Index;

  static void gptq_gemm(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = tensor_at(stack, 0);
    const WeightArguments arguments(stack + 1);
    const Shape shape = check_gptq_gemm(x, arguments);
    Device::check("gptq_gemm");
    const Index order = row_order("gptq_gemm", arguments.options, shape, false);
    const layout::Weight weight = arguments.weight(shape, order.get());
    give_back(stack, product(&weight, 1, x));
  }

  static void gptq_gemm_multi(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = tensor_at(stack, 0);
    const PartsArguments arguments(stack + 1);
    const std::vector<Shape> shapes = check_gptq_gemm_multi(x, arguments);
    Device::check("gptq_gemm_multi");
    const Index order = row_order("gptq_gemm_multi", arguments.options, shapes[0], false);
    const std::vector<layout::Weight> parts = arguments.weights(shapes, order.get());
    give_back(stack, product(parts.data(), static_cast<int64_t>(parts.size()), x));
  }

  static void gptq_gemm_dx(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor grad = tensor_at(stack, 0);
    const WeightArguments arguments(stack + 1);
    const Shape shape = check_gptq_gemm_dx(grad, arguments);
    Device::check("gptq_gemm_dx");
    const Index order = row_order("gptq_gemm_dx", arguments.options, shape, true);
    const layout::Weight weight = arguments.weight(shape, order.get());
    const int64_t sizes[] = {grad.size(0), shape.in_features};
    Tensor dx = Tensor::empty(sizes, grad.dtype(), grad);
    if (grad.size(0) > 0) Device::gemm_dx(weight, grad, dx);
    give_back(stack, std::move(dx));
  }

  static void gptq_moe_gemm(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor x = tensor_at(stack, 0);
    const ExpertsArguments arguments(stack + 1);
    const Shape shape = check_gptq_moe_gemm(x, arguments);
    Device::check("gptq_moe_gemm");
    const int64_t sizes[] = {x.size(0), shape.N};
    Tensor out = Tensor::empty(sizes, x.dtype(), x);
    Device::moe_gemm(arguments, shape, x, out);
    give_back(stack, std::move(out));
  }

  static void gptq_moe_gemm_dx(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor grad = tensor_at(stack, 0);
    const ExpertsArguments arguments(stack + 1);
    const Shape shape = check_gptq_moe_gemm_dx(grad, arguments);
    Device::check("gptq_moe_gemm_dx");
    const int64_t sizes[] = {grad.size(0), shape.in_features};
    Tensor dx = Tensor::empty(sizes, grad.dtype(), grad);
    Device::moe_gemm_dx(arguments, shape, grad, dx);
    give_back(stack, std::move(dx));
  }

  static void gptq_dequantize(StableIValue* stack, uint64_t, uint64_t) {
    const WeightArguments arguments(stack);
    const Shape shape = check_gptq_dequantize(arguments);
    Device::check("gptq_dequantize");
    const Index order = row_order("gptq_dequantize", arguments.options, shape, true);
    const int64_t sizes[] = {shape.in_features, shape.N};
    Tensor out = Tensor::empty(sizes, arguments.scales.dtype(), arguments.scales);
    Device::dequantize(arguments.weight(shape, order.get()), out);
    give_back(stack, std::move(out));
  }

  static void gptq_shuffle(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor qweight = tensor_at(stack, 0);
    const Tensor q_perm = tensor_at(stack, 1);
    const auto bit = torch::stable::detail::to<int64_t>(stack[2]);
    const int64_t K = check_gptq_shuffle(qweight, q_perm, bit);
    Device::check("gptq_shuffle");
    const Index perm("gptq_shuffle", "q_perm", q_perm, K, true);
    if (qweight.size(1) > 0) Device::shuffle(qweight, perm.get(), K, static_cast<int32_t>(bit));
  }

  static void gptq_unshuffle(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor qweight = tensor_at(stack, 0);
    const Tensor q_perm = tensor_at(stack, 1);
    const auto bit = torch::stable::detail::to<int64_t>(stack[2]);
    const int64_t K = check_gptq_unshuffle(qweight, q_perm, bit);
    Device::check("gptq_unshuffle");
    const Index perm("gptq_unshuffle", "q_perm", q_perm, K, true);
    const int64_t sizes[] = {qweight.size(0), qweight.size(1)};
    Tensor out = Tensor::empty(sizes, kInt32, qweight);
    if (sizes[1] > 0) Device::unshuffle(qweight, perm.get(), K, static_cast<int32_t>(bit), out);
    give_back(stack, std::move(out));
  }

 private:
  // The permutation or the groups of a weight's rows. An op that writes to the rows of a permutation needs each of them.
  static Index row_order(const char* op, const Options& options, const Shape& shape, bool writes_to_its_rows) {
    if (shape.filled) return {op, options.g_idx, shape};
    return {op, "g_idx", options.g_idx, options.use_exllama ? shape.K : shape.G,
            options.use_exllama && writes_to_its_rows};
  }

  // x times every part, side by side.
  static Tensor product(const layout::Weight* parts, int64_t count, const Tensor& x) {
    const int64_t sizes[] = {x.size(0), layout::columns_of(parts, count)};
    Tensor out = Tensor::empty(sizes, x.dtype(), x);
    if (x.size(0) > 0) Device::gemm(parts, count, x, out);
    return out;
  }
};

// An overload without autograd has the kernel of its op.
template <typename Device>
inline constexpr Implementation kImplementations[] = {
    {"gptq_shuffle", Ops<Device>::gptq_shuffle},
    {"gptq_unshuffle", Ops<Device>::gptq_unshuffle},
    {"gptq_dequantize", Ops<Device>::gptq_dequantize},
    {"gptq_gemm", Ops<Device>::gptq_gemm},
    {"gptq_gemm.no_autograd", Ops<Device>::gptq_gemm},
    {"gptq_gemm_dx", Ops<Device>::gptq_gemm_dx},
    {"gptq_gemm_dx.no_autograd", Ops<Device>::gptq_gemm_dx},
    {"gptq_gemm_multi", Ops<Device>::gptq_gemm_multi},
    {"gptq_gemm_multi.no_autograd", Ops<Device>::gptq_gemm_multi},
    {"gptq_moe_gemm", Ops<Device>::gptq_moe_gemm},
    {"gptq_moe_gemm.no_autograd", Ops<Device>::gptq_moe_gemm},
    {"gptq_moe_gemm_dx", Ops<Device>::gptq_moe_gemm_dx},
    {"gptq_moe_gemm_dx.no_autograd", Ops<Device>::gptq_moe_gemm_dx},
};

}  // namespace exllama::bindings
