#include "cpu/isa/neon/float_words.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#define EXLLAMA_VECTOR
#define EXLLAMA_HAS_DOTPROD 0
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/gemv-float-inl.h"

namespace exllama::cpu {

void neon::gemv_float(const Gemv& gemv) { multiply_words_as_floats(gemv); }

}  // namespace exllama::cpu

#endif
