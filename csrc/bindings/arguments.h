// The arguments of the ops, from the dispatcher's stack, and their results back to it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/tensor.h"
#include "layout/weight.h"

namespace exllama::bindings {

// What a weight holds, once its arguments have passed the checks.
struct Shape {
  int64_t K;
  int64_t N;
  int64_t G;
  int64_t in_features;  // columns of x: K, or fewer if qweight is filled
  bool filled;
};

inline layout::DType dtype_of(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case kFloat16:
      return layout::DType::kFloat16;
    case kBFloat16:
      return layout::DType::kBFloat16;
    case kFloat32:
      return layout::DType::kFloat32;
    default:
      throw std::logic_error("exllama_ops: a tensor of another dtype has passed the checks");
  }
}

inline Tensor tensor_at(const StableIValue* stack, int index) {
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[index]));
}

inline void give_back(StableIValue* stack, Tensor result) { stack[0] = torch::stable::detail::from(result.release()); }

// The entries of a list, which is taken over as a tensor is.
inline std::vector<Tensor> tensors_at(const StableIValue* stack, int index) {
  const auto list = torch::stable::detail::to<StableListHandle>(stack[index]);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  std::vector<Tensor> tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue entry;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &entry));
    tensors.emplace_back(torch::stable::detail::to<AtenTensorHandle>(entry));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return tensors;
}

// The arguments that say how a weight, or each of several, is to be read. They stand last on the stack.
struct Options {
  Tensor g_idx;
  bool use_exllama;
  int64_t bit;
  bool use_v2_format;
  int64_t group_size;

  explicit Options(const StableIValue* stack) : Options(tensor_at(stack, 0), stack + 1) {}
  // The others stand on the stack.
  Options(Tensor order, const StableIValue* stack)
      : g_idx(std::move(order)),
        use_exllama(torch::stable::detail::to<bool>(stack[0])),
        bit(torch::stable::detail::to<int64_t>(stack[1])),
        use_v2_format(torch::stable::detail::to<bool>(stack[2])),
        group_size(torch::stable::detail::to<int64_t>(stack[3])) {}

  // For the kernels, after the checks. `row_order` is g_idx or a copy of it, or null if it is empty.
  layout::Weight weight(const Tensor& qweight, const Tensor& qzeros, const Tensor& scales, const Shape& shape,
                        const int32_t* row_order) const {
    // A raw g_idx needs no group size, and any may have come with it.
    const bool groups_of_equal_size = use_exllama || row_order == nullptr;
    layout::Weight weight;
    weight.qweight = qweight.data<const uint32_t>();
    weight.qzeros = qzeros.data<const uint32_t>();
    weight.scales = scales.data<const void>();
    weight.scales_dtype = dtype_of(scales);
    weight.row_order = row_order;
    weight.K = shape.K;
    weight.N = shape.N;
    weight.G = shape.G;
    weight.in_features = shape.in_features;
    weight.group_size = group_size != 0 ? group_size : (groups_of_equal_size ? shape.K / shape.G : 1);
    weight.bits = static_cast<int32_t>(bit);
    weight.shuffled = use_exllama;
    weight.zero_offset = use_v2_format ? 0 : 1;
    return weight;
  }
};

// The arguments of a weight, which stand on the stack one after the other.
struct WeightArguments {
  Tensor qweight;
  Tensor qzeros;
  Tensor scales;
  Options options;

  explicit WeightArguments(const StableIValue* stack)
      : qweight(tensor_at(stack, 0)), qzeros(tensor_at(stack, 1)), scales(tensor_at(stack, 2)), options(stack + 3) {}

  layout::Weight weight(const Shape& shape, const int32_t* row_order) const {
    return options.weight(qweight, qzeros, scales, shape, row_order);
  }
};

// The arguments of gptq_gemm_multi: lists of the parts' tensors, and what the parts share.
struct PartsArguments {
  std::vector<Tensor> qweight;
  std::vector<Tensor> qzeros;
  std::vector<Tensor> scales;
  Options options;

  explicit PartsArguments(const StableIValue* stack)
      : qweight(tensors_at(stack, 0)), qzeros(tensors_at(stack, 1)), scales(tensors_at(stack, 2)), options(stack + 3) {}

  std::vector<layout::Weight> weights(const std::vector<Shape>& shapes, const int32_t* row_order) const {
    std::vector<layout::Weight> weights;
    weights.reserve(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      weights.push_back(options.weight(qweight[i], qzeros[i], scales[i], shapes[i], row_order));
    }
    return weights;
  }
};

// The arguments of gptq_moe_gemm: stacks of the experts' tensors, what rows they have, and what they share.
struct ExpertsArguments {
  Tensor qweight;
  Tensor qzeros;
  Tensor scales;
  Options options;  // its g_idx has the order of each expert, or is empty
  Tensor offsets;

  explicit ExpertsArguments(const StableIValue* stack)
      : qweight(tensor_at(stack, 0)),
        qzeros(tensor_at(stack, 1)),
        scales(tensor_at(stack, 2)),
        options(tensor_at(stack, 3), stack + 5),
        offsets(tensor_at(stack, 4)) {}

  bool ordered() const { return options.g_idx.dim() == 2; }

  // The weight of one expert. `row_order` is its own, as for Options::weight.
  layout::Weight weight(int64_t expert, const Shape& shape, const int32_t* row_order) const {
    layout::Weight weight = options.weight(qweight, qzeros, scales, shape, row_order);
    weight.qweight += expert * (shape.K * options.bit / 32) * shape.N;
    weight.qzeros += expert * shape.G * (shape.N * options.bit / 32);
    const int64_t scales_bytes = shape.G * shape.N * layout::bytes_of(weight.scales_dtype);
    weight.scales = static_cast<const char*>(weight.scales) + expert * scales_bytes;
    return weight;
  }
};

}  // namespace exllama::bindings
