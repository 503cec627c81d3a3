#include "cpu/isa/neon/gemv.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#define EXLLAMA_VECTOR
#define EXLLAMA_HAS_DOTPROD 0
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/gemv-inl.h"

namespace exllama::cpu {

void neon::gemv(const Gemv& gemv) { multiply_words<Dot::kInt16>(gemv); }

}  // namespace exllama::cpu

#endif
