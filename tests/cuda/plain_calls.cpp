// The functions of cuda.h as C functions, for callers without torch. Each returns null, or what went wrong.
#include <exception>
#include <string>

#include "cuda/cuda.h"
#include "cuda/splits.h"

using namespace exllama::cuda;

namespace {

template <typename F>
const char* error_of(const F& f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

extern "C" {

// What the driver told of the device.
void plain_device(int64_t* out) {
  const Device& device = device_properties(0);
  out[0] = device.arch;
  out[1] = device.sm_count;
  out[2] = device.l2_bytes;
  out[3] = device.clock_khz;
  out[4] = device.dram_mb_per_s;
}

void plain_set_launches_overlap(bool enabled) { set_launches_overlap(enabled); }

// The tickets of a launch on a stream, or null.
void* plain_tickets(int64_t stream) { return tickets_for(reinterpret_cast<Stream>(stream)); }

// The algorithm's config for a problem, and the bytes of its workspace; negative if it cannot.
int64_t plain_config(const Weight* parts, int64_t count, const Experts* experts, int32_t dtype, int64_t M,
                     int32_t algorithm, Config* config) {
  const Gemm& chosen = gemm_of(static_cast<Algorithm>(algorithm));
  const Problem problem = problem_of(parts, count, *experts, static_cast<DType>(dtype), M, device_properties(0), false);
  if (!chosen.can(problem)) return -1;
  *config = chosen.config(problem);
  return static_cast<int64_t>(gemm_workspace_bytes(problem, *config));
}

int64_t plain_workspace_bytes(const Weight* parts, int64_t count, const Experts* experts, int32_t dtype, int64_t M,
                              const Config* config) {
  const Problem problem = problem_of(parts, count, *experts, static_cast<DType>(dtype), M, device_properties(0), false);
  return static_cast<int64_t>(gemm_workspace_bytes(problem, *config));
}

const char* plain_gemm(const Weight* parts, int64_t count, const Experts* experts, const void* x, int32_t dtype,
                       int64_t M, void* out, const Config* config, void* workspace) {
  return error_of(
      [&] { gemm(parts, count, *experts, x, static_cast<DType>(dtype), M, out, *config, workspace, nullptr); });
}

const char* plain_gemm_dx(const Weight* weight, const Experts* experts, const void* grad, int32_t dtype, int64_t M,
                          void* dx) {
  return error_of([&] { gemm_dx(*weight, *experts, grad, static_cast<DType>(dtype), M, dx, nullptr); });
}

const char* plain_dequantize(const Weight* weight, int64_t first, int64_t columns, void* out, int32_t dtype) {
  return error_of([&] { dequantize(*weight, first, columns, out, static_cast<DType>(dtype), nullptr); });
}

const char* plain_shuffle(uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, void* workspace) {
  return error_of([&] { shuffle(qweight, perm, K, N, bits, workspace, nullptr); });
}

const char* plain_unshuffle(const uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits,
                            uint32_t* out, void* workspace) {
  return error_of([&] { unshuffle(qweight, perm, K, N, bits, out, workspace, nullptr); });
}

int64_t plain_shuffle_workspace_bytes(int64_t K, int64_t N, int32_t bits, bool permuted) {
  return static_cast<int64_t>(shuffle_workspace_bytes(K, N, bits, permuted));
}

int64_t plain_unshuffle_workspace_bytes(int64_t K, bool permuted) {
  return static_cast<int64_t>(unshuffle_workspace_bytes(K, permuted));
}

}  // extern "C"
