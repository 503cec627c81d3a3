// The properties of the devices.
#include <array>
#include <mutex>

#include "launch.h"

namespace exllama::cuda {
namespace {

constexpr int kMaxDevices = 64;

// 0 if this driver does not tell it.
int64_t attribute_or_zero(cudaDeviceAttr attribute, int32_t index) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, attribute, index) == cudaSuccess) return value;
  cudaGetLastError();  // or the next launch would seem to have failed
  return 0;
}

// Every op calls the runtime here first. The runtime is linked into this library, so an older driver is noticed here.
int attribute(cudaDeviceAttr attribute, int32_t index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error("exllama_ops: the CUDA driver is older than CUDA " +
                             std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
                             ", which compiled these kernels: install a newer driver, or compile them by the nvcc of "
                             "its version (EXLLAMA_OPS_NVCC names it; exllama-ops build --cuda --force)");
  }
  check(error, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int32_t toolkit_version() { return CUDART_VERSION; }

const Device& device_properties(int32_t index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (index < 0 || index >= kMaxDevices) throw std::out_of_range("exllama_ops: device index out of range");
  std::call_once(asked[index], [&] {
    devices[index].arch =
        10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    devices[index].sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
    devices[index].l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
    // CUDA 13 has dropped the clocks from cudaDeviceProp, and kept these attributes. There are two transfers a clock.
    devices[index].clock_khz = attribute_or_zero(cudaDevAttrClockRate, index);
    devices[index].dram_mb_per_s = 2 * attribute_or_zero(cudaDevAttrMemoryClockRate, index) *
                                   attribute_or_zero(cudaDevAttrGlobalMemoryBusWidth, index) / 8 / 1000;
  });
  return devices[index];
}

}  // namespace exllama::cuda
