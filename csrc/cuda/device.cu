// The current device and its properties.
#include <array>
#include <mutex>

#include "launch.h"

namespace exllama::cuda {
namespace {

constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr attribute, int32_t index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
  return value;
}

// Every op calls the runtime here first. The runtime is linked into this library, so an older driver is noticed here.
int current_device() {
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error("exllama_ops: the CUDA driver is older than CUDA " +
                             std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
                             ", which compiled these kernels: install a newer driver, or compile them by the nvcc of "
                             "its version (EXLLAMA_OPS_NVCC names it; exllama-ops build --cuda --force)");
  }
  check(error, "cudaGetDevice");
  return index;
}

}  // namespace

const Device& device_properties(int32_t index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (index < 0 || index >= kMaxDevices) throw std::out_of_range("exllama_ops: device index out of range");
  std::call_once(asked[index], [&] {
    devices[index].arch =
        10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    devices[index].sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
    devices[index].l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  });
  return devices[index];
}

DeviceGuard::DeviceGuard(int32_t index) : previous_(current_device()), changed_(false) {
  if (previous_ == index) return;
  check(cudaSetDevice(index), "cudaSetDevice");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

}  // namespace exllama::cuda
