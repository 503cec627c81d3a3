// A tensor as the ops see it, over torch's C shim: what is asked of an argument, read once.
//
// torch::stable::Tensor would cost two heap allocations an argument more, which shows in a call of a few microseconds.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <type_traits>

namespace exllama::bindings {

// Values of torch's ScalarType, which its stable ABI fixes.
enum ScalarType : int32_t { kUInt8 = 0, kInt32 = 3, kFloat16 = 5, kFloat32 = 6, kBFloat16 = 15 };

class Tensor {
 public:
  Tensor() = default;
  // Takes the handle over, as a boxed kernel takes its arguments from the stack.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined_));
    if (!defined_) return;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_));
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept { *this = static_cast<Tensor&&>(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    if (this != &other) {
      reset();
      handle_ = other.release();
      defined_ = other.defined_;
      dim_ = other.dim_;
      sizes_ = other.sizes_;
      strides_ = other.strides_;
      dtype_ = other.dtype_;
      device_type_ = other.device_type_;
      device_index_ = other.device_index_;
    }
    return *this;
  }
  ~Tensor() { reset(); }

  // New contiguous memory from torch's allocator; torch poisons it under torch.use_deterministic_algorithms.
  // It lies on the device of `neighbour`.
  template <int dims>
  static Tensor empty(const int64_t (&sizes)[dims], int32_t dtype, const Tensor& neighbour) {
    int64_t strides[dims];
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
      strides[d] = stride;
      stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, neighbour.device_type_,
                                                    neighbour.device_index_, &handle));
    return Tensor(handle);
  }

  // Whether a caller gave a tensor: Python's None comes as one that is not.
  bool defined() const { return defined_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int64_t elements() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim_; ++d) product *= sizes_[d];
    return product;
  }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  bool on_the_device_of(const Tensor& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }

  int64_t storage_offset() const {
    int64_t offset = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle_, &offset));
    return offset;
  }
  int64_t storage_bytes() const {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle_, &bytes));
    return bytes;
  }

  // A const T leaves a lazily copied tensor uncopied.
  template <typename T>
  T* data() const {
    if constexpr (std::is_const_v<T>) {
      const void* pointer = nullptr;
      TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &pointer));
      return static_cast<T*>(pointer);
    } else {
      void* pointer = nullptr;
      TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &pointer));
      return static_cast<T*>(pointer);
    }
  }

  AtenTensorHandle handle() const { return handle_; }

  // Gives the handle up, as a boxed kernel puts its result on the stack.
  AtenTensorHandle release() {
    AtenTensorHandle handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  void reset() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
    handle_ = nullptr;
  }

  AtenTensorHandle handle_ = nullptr;
  bool defined_ = false;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int32_t dtype_ = 0;
  int32_t device_type_ = 0;
  int32_t device_index_ = 0;
};

}  // namespace exllama::bindings
