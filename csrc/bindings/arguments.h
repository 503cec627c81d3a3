// What the kernels of every device share: arguments from the dispatcher's stack, results back to it, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings/checks.h"
#include "bindings/tensor.h"
#include "layout/weight.h"

namespace exllama::bindings {

// Scratch memory from torch's allocator, 64-byte aligned whatever allocator is set.
class Workspace {
 public:
  Workspace(size_t bytes, const Tensor& like) : memory_(nothing_or_empty(bytes, like)) {
    if (bytes == 0) return;
    const auto address = reinterpret_cast<uintptr_t>(memory_.data<void>());
    pointer_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  void* get() const { return pointer_; }

 private:
  static constexpr uintptr_t kAlignment = 64;

  static Tensor nothing_or_empty(size_t bytes, const Tensor& like) {
    if (bytes == 0) return Tensor();
    const int64_t sizes[] = {static_cast<int64_t>(bytes + kAlignment - 1)};
    return Tensor::empty(sizes, kUInt8, like.device_type(), like.device_index());
  }

  Tensor memory_;
  void* pointer_ = nullptr;
};

inline layout::DType dtype_of(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case kFloat16:
      return layout::DType::kFloat16;
    case kBFloat16:
      return layout::DType::kBFloat16;
    default:
      return layout::DType::kFloat32;
  }
}

inline Tensor tensor_at(const StableIValue* stack, int index) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[index])); }

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

// The arguments that say how a packed weight, or each of several, is to be read; they stand last on the stack.
struct Options {
  Tensor g_idx;
  bool use_exllama;
  int64_t bit;
  bool use_v2_format;
  int64_t group_size;

  explicit Options(const StableIValue* stack)
      : g_idx(tensor_at(stack, 0)),
        use_exllama(torch::stable::detail::to<bool>(stack[1])),
        bit(torch::stable::detail::to<int64_t>(stack[2])),
        use_v2_format(torch::stable::detail::to<bool>(stack[3])),
        group_size(torch::stable::detail::to<int64_t>(stack[4])) {}

  // Where g_idx lies, or null if it is empty; after the checks.
  const int32_t* rows() const { return g_idx.size(0) != 0 ? g_idx.data<const int32_t>() : nullptr; }

  // For the kernels, after the checks; `rows` is g_idx or a copy of it.
  layout::Weight weight(const Tensor& qweight, const Tensor& qzeros, const Tensor& scales, const Shape& shape,
                        const int32_t* rows) const {
    // A raw g_idx needs no group size, and any may have come with it.
    const bool groups_of_equal_size = use_exllama || rows == nullptr;
    layout::Weight weight;
    weight.qweight = qweight.data<const uint32_t>();
    weight.qzeros = qzeros.data<const uint32_t>();
    weight.scales = scales.data<const void>();
    weight.scales_dtype = dtype_of(scales);
    weight.row_order = rows;
    weight.K = shape.K;
    weight.N = shape.N;
    weight.G = shape.G;
    weight.group_size = group_size != 0 ? group_size : (groups_of_equal_size ? shape.K / shape.G : 1);
    weight.bits = static_cast<int32_t>(bit);
    weight.shuffled = use_exllama;
    weight.zero_offset = use_v2_format ? 0 : 1;
    return weight;
  }
};

// The arguments of a packed weight, which stand on the stack one after the other.
struct PackedWeight {
  Tensor qweight;
  Tensor qzeros;
  Tensor scales;
  Options options;

  explicit PackedWeight(const StableIValue* stack)
      : qweight(tensor_at(stack, 0)), qzeros(tensor_at(stack, 1)), scales(tensor_at(stack, 2)), options(stack + 3) {}

  WeightArguments arguments() const {
    return {qweight, qzeros, scales, options.g_idx, options.use_exllama, options.bit, options.group_size};
  }
  layout::Weight weight(const Shape& shape, const int32_t* rows) const {
    return options.weight(qweight, qzeros, scales, shape, rows);
  }
  layout::Weight weight(const Shape& shape) const { return weight(shape, options.rows()); }
};

// The arguments of gptq_gemm_multi: lists of the parts' tensors, and what the parts share.
struct PackedWeights {
  std::vector<Tensor> qweight;
  std::vector<Tensor> qzeros;
  std::vector<Tensor> scales;
  Options options;

  explicit PackedWeights(const StableIValue* stack)
      : qweight(tensors_at(stack, 0)), qzeros(tensors_at(stack, 1)), scales(tensors_at(stack, 2)), options(stack + 3) {}

  // The shape of each part.
  std::vector<Shape> check(const Tensor& x) const {
    check_gptq_gemm_multi(x, static_cast<int64_t>(qweight.size()), static_cast<int64_t>(qzeros.size()),
                          static_cast<int64_t>(scales.size()));
    std::vector<Shape> shapes;
    shapes.reserve(qweight.size());
    for (size_t i = 0; i < qweight.size(); ++i) {
      const auto part = static_cast<int64_t>(i);
      shapes.push_back(check_gptq_gemm_multi_part(
          x,
          {qweight[i], qzeros[i], scales[i], options.g_idx, options.use_exllama, options.bit, options.group_size, part},
          i > 0 ? &shapes[0] : nullptr));
    }
    return shapes;
  }

  // Each part for the kernels, after the checks.
  std::vector<layout::Weight> weights(const std::vector<Shape>& shapes, const int32_t* rows) const {
    std::vector<layout::Weight> weights;
    weights.reserve(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      weights.push_back(options.weight(qweight[i], qzeros[i], scales[i], shapes[i], rows));
    }
    return weights;
  }
};

}  // namespace exllama::bindings
