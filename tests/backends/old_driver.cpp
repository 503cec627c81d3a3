// device.cu without a compiler for CUDA, on a runtime whose driver is too old.
#include "cuda/launch.h"

extern "C" {
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorInsufficientDriver; }
cudaError_t cudaGetLastError() { return cudaErrorInsufficientDriver; }
const char* cudaGetErrorString(cudaError_t) { return "too old"; }

const char* first_call() {
  static std::string text;
  try {
    exllama::cuda::device_properties(0);
    return "nothing was thrown";
  } catch (const std::runtime_error& error) {
    text = error.what();
    return text.c_str();
  }
}
}
