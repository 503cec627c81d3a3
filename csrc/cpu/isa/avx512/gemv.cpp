#include "cpu/isa/avx512/gemv.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx512/vocabulary-inl.h"

#include "cpu/generic/gemv-inl.h"

namespace exllama::cpu {

void avx512::gemv(const Gemv& gemv) { multiply_words<Dot::kInt16>(gemv); }

void avx512::vnni_gemv(const Gemv& gemv) {
  if (gemv.int8) return multiply_words<Dot::kInt8>(gemv);
  multiply_words<Dot::kInt16Vnni>(gemv);
}

}  // namespace exllama::cpu

#endif
