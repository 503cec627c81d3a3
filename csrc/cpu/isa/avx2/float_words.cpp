#include "cpu/isa/avx2/float_words.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx2/vocabulary-inl.h"

#include "cpu/generic/gemv-float-inl.h"

namespace exllama::cpu {

void avx2::gemv_float(const Gemv& gemv) { multiply_words_as_floats(gemv); }

}  // namespace exllama::cpu

#endif
