// Scratch memory of the ops.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bindings/tensor.h"

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
    return Tensor::empty(sizes, kUInt8, like);
  }

  Tensor memory_;
  void* pointer_ = nullptr;
};

}  // namespace exllama::bindings
