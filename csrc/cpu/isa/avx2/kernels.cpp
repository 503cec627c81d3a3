// The tables for AVX2 with FMA and F16C, with and without AVX-VNNI.
// Without VNNI, vpmaddubsw multiplies int8 values of x by at most 4 bits. With 8 bits it would saturate.
#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx2/vocabulary-inl.h"

#include "cpu/generic/short_int8-inl.h"
#include "cpu/generic/table-inl.h"
#include "cpu/isa/avx2/float_words.h"
#include "cpu/isa/avx2/gemv.h"
#include "cpu/isa/x86_features.h"

namespace exllama::cpu {

const Kernels& avx2::kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<false>();
    use_short_int8(made);
    made.name = "avx2";
    made.available = x86::has_avx2;
    made.gemv = avx2::gemv;
    made.gemv_float = avx2::gemv_float;
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
    made.gemv_float = avx2::gemv_float;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
