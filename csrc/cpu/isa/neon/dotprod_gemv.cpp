#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#include "cpu/isa/neon/targets.h"

#define EXLLAMA_VECTOR EXLLAMA_NEON_DOTPROD
#define EXLLAMA_HAS_DOTPROD 1
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/gemv-inl.h"
#include "cpu/isa/neon/gemv.h"

namespace exllama::cpu {

void neon::dotprod_gemv(const Gemv& gemv) {
  if (gemv.int8) return multiply_words<Dot::kInt8>(gemv);
  multiply_words<Dot::kInt16>(gemv);
}

}  // namespace exllama::cpu

#endif
