// The tables for AVX2 with FMA and F16C, with and without AVX-VNNI.
// vpmaddubsw would saturate, so that without VNNI int8 values of x go through the int16 panel.
#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx2/vocabulary-inl.h"

#include "cpu/generic/table-inl.h"
#include "cpu/isa/avx2/gemv.h"
#include "cpu/isa/x86_features.h"

namespace exllama::cpu {

const Kernels& avx2::kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<false>();
    made.name = "avx2";
    made.available = x86::has_avx2;
    made.gemv = avx2::gemv;
    return made;
  }();
  return table;
}

const Kernels& avx2::vnni_kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<true>();
    made.name = "avx2_vnni";
    made.available = x86::has_avx_vnni;
    made.gemv = avx2::vnni_gemv;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
