// The device of an op and torch's current stream on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/cuda.h"

// It is in libtorch_cuda. Weak, so that the library loads beside a torch without CUDA, where no kernel is called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace exllama::bindings {

inline cuda::Stream current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(
        "exllama_ops: the CUDA kernels need aoti_torch_get_current_cuda_stream of torch, which this torch does not "
        "have: install a torch that was built for CUDA, or set EXLLAMA_OPS_BACKEND=triton");
  }
  cuda::Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Makes a device the current one. torch's guard goes back to the device before without making a context there:
// cudaSetDevice would, which takes half a gigabyte of a GPU that the process may never use.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index, &handle_)); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }

 private:
  DeviceGuardHandle handle_ = nullptr;
};

class DeviceScope {
 public:
  explicit DeviceScope(int32_t index)
      : device_(cuda::device_properties(index)), guard_(index), stream_(current_stream(index)) {}
  cuda::Stream stream() const { return stream_; }
  const cuda::Device& device() const { return device_; }

 private:
  const cuda::Device& device_;
  DeviceGuard guard_;
  cuda::Stream stream_;
};

}  // namespace exllama::bindings
