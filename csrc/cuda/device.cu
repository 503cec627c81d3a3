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

}  // namespace

const Device& device_properties(int32_t index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (index < 0 || index >= kMaxDevices) throw std::out_of_range("exllama_ops: device index out of range");
  std::call_once(asked[index], [&] {
    devices[index].arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                          attribute(cudaDevAttrComputeCapabilityMinor, index);
    devices[index].sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
    devices[index].l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  });
  return devices[index];
}

DeviceGuard::DeviceGuard(int32_t index) : previous_(0), changed_(false) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == index) return;
  check(cudaSetDevice(index), "cudaSetDevice");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

}  // namespace exllama::cuda
