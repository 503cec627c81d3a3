// What the kernels of every device share: arguments from the dispatcher's stack, results back to it, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>

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

// The arguments of a packed weight, which stand on the stack one after the other.
struct PackedWeight {
  Tensor qweight;
  Tensor qzeros;
  Tensor scales;
  Tensor g_idx;
  bool use_exllama;
  int64_t bit;
  bool use_v2_format;
  int64_t group_size;

  explicit PackedWeight(const StableIValue* stack)
      : qweight(tensor_at(stack, 0)),
        qzeros(tensor_at(stack, 1)),
        scales(tensor_at(stack, 2)),
        g_idx(tensor_at(stack, 3)),
        use_exllama(torch::stable::detail::to<bool>(stack[4])),
        bit(torch::stable::detail::to<int64_t>(stack[5])),
        use_v2_format(torch::stable::detail::to<bool>(stack[6])),
        group_size(torch::stable::detail::to<int64_t>(stack[7])) {}

  WeightArguments arguments() const { return {qweight, qzeros, scales, g_idx, use_exllama, bit, group_size}; }

  // For the kernels, after the checks.
  layout::Weight weight(const Shape& shape) const {
    const int32_t* rows = g_idx.size(0) != 0 ? g_idx.data<const int32_t>() : nullptr;
    // A raw g_idx needs no group size, and any may have come with it.
    const bool groups_of_equal_size = use_exllama || rows == nullptr;
    layout::Weight weight;
    weight.qweight = qweight.data<const uint32_t>();
    weight.qzeros = qzeros.data<const uint32_t>();
    weight.scales = scales.data<const void>();
    weight.scales_dtype = dtype_of(scales);
    weight.rows = rows;
    weight.K = shape.K;
    weight.N = shape.N;
    weight.G = shape.G;
    weight.group_size = group_size != 0 ? group_size : (groups_of_equal_size ? shape.K / shape.G : 1);
    weight.bits = static_cast<int32_t>(bit);
    weight.shuffled = use_exllama;
    weight.zeros_v2 = use_v2_format;
    return weight;
  }
};

}  // namespace exllama::bindings
