// Stands for csrc/cpu in the tests of building and loading: compiles in a second, computes nothing of use.
#include <cstring>

#include "cpu/cpu.h"

namespace exllama::cpu {

size_t gemm_workspace_bytes(const Weight*, int64_t, int64_t, Precision, int32_t) { return 0; }
size_t gemm_dx_workspace_bytes(const Weight&, int64_t, int32_t) { return 0; }
size_t moe_gemm_workspace_bytes(const Expert*, int64_t, Precision, int32_t) { return 0; }
size_t moe_gemm_dx_workspace_bytes(const Expert*, int64_t, int32_t) { return 0; }
void moe_gemm(const Expert*, int64_t, const void*, DType, void*, Precision, void*, const Parallel&) {}
void moe_gemm_dx(const Expert*, int64_t, const void*, DType, void*, void*, const Parallel&) {}
size_t shuffle_workspace_bytes(int64_t, int32_t, int32_t) { return 0; }
void gemm(const Weight*, int64_t, const void*, DType, int64_t, void*, Precision, void*, const Parallel&) {}
void gemm_dx(const Weight&, const void*, DType, int64_t, void*, void*, const Parallel&) {}
void dequantize(const Weight&, void*, const Parallel&) {}
void shuffle(uint32_t*, const int32_t*, int64_t, int64_t, int32_t, void*, const Parallel&) {}
void unshuffle(const uint32_t*, const int32_t*, int64_t K, int64_t N, int32_t bits, uint32_t* out, void*,
               const Parallel&) {
  std::memset(out, 0x2a, static_cast<size_t>(K * bits / 32 * N * 4));  // the mark by which tests know the stub
}

const char* const* isa_names() {
  static const char* const names[] = {"scalar", nullptr};
  return names;
}
bool isa_available(const char* name) { return std::strcmp(name, "scalar") == 0; }
const char* isa_in_use() { return "scalar"; }
void use_isa(const char*) {}

}  // namespace exllama::cpu
