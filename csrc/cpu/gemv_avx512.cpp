// A few rows of x by the words of a shuffled weight, for AVX-512.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx512.h"

#include "gemv.h"

namespace exllama::cpu {

void avx512::gemv(const Gemv& gemv) { cpu::gemv<Dot::kInt16>(gemv); }
void avx512::gemv_vnni(const Gemv& gemv) {
  if (gemv.int8) return cpu::gemv<Dot::kInt8>(gemv);
  cpu::gemv<Dot::kInt16Vnni>(gemv);
}

}  // namespace exllama::cpu

#endif
