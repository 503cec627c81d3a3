// Whether launches overlap: see overlap.h.
#include "overlap.h"

#include <array>
#include <atomic>
#include <mutex>

namespace exllama::cuda {
namespace {

constexpr int kMaxDevices = 64, kFirstToWait = 90;

std::atomic<bool> enabled{false};

// Nobody launches it. It is compiled as the others are, so the driver loads its code for the same architecture.
__global__ void compiled_as_the_others() {}

// Whether the code that the current device has waits: what PTX it was made from says.
bool code_waits() {
  cudaFuncAttributes attributes{};
  // This may load the module. While a stream is captured that is allowed in this mode alone.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  const cudaError_t error = cudaFuncGetAttributes(&attributes, compiled_as_the_others);
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  check(error, "cudaFuncGetAttributes");
  return attributes.ptxVersion >= kFirstToWait;
}

}  // namespace

void set_launches_overlap(bool overlap) { enabled.store(overlap, std::memory_order_relaxed); }

bool launches_overlap() {
  if (!enabled.load(std::memory_order_relaxed)) return false;
  static std::array<bool, kMaxDevices> waits;
  static std::array<std::once_flag, kMaxDevices> asked;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMaxDevices) return false;
  std::call_once(asked[device], [&] { waits[device] = code_waits(); });
  return waits[device];
}

}  // namespace exllama::cuda
