// The tables for AVX-512 (F, BW, DQ, VL), with and without VNNI.
#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx512/vocabulary-inl.h"

#include "cpu/generic/short_int8-inl.h"
#include "cpu/generic/table-inl.h"
#include "cpu/isa/avx512/float_words.h"
#include "cpu/isa/avx512/gemv.h"
#include "cpu/isa/avx512/word_tiles.h"
#include "cpu/isa/x86_features.h"

namespace exllama::cpu {

const Kernels& avx512::kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<false>();
    use_short_int8(made);
    made.name = "avx512";
    made.available = x86::has_avx512;
    made.gemv = avx512::gemv;
    made.gemv_float = avx512::gemv_float;
    made.multiply_float_words = avx512::multiply_float_words;
    return made;
  }();
  return table;
}

const Kernels& avx512::vnni_kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<true>();
    made.name = "avx512_vnni";
    made.available = x86::has_avx512_vnni;
    made.gemv = avx512::vnni_gemv;
    made.gemv_float = avx512::gemv_float;
    made.multiply_float_words = avx512::multiply_float_words;
    made.multiply_words = avx512::vnni_multiply_words;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
