#include "cpu/isa/avx512/float_words.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx512/vocabulary-inl.h"

#include "cpu/generic/gemv-float-inl.h"
#include "cpu/generic/product-float-inl.h"

namespace exllama::cpu {

void avx512::gemv_float(const Gemv& gemv) { multiply_words_as_floats(gemv); }

void avx512::multiply_float_words(const Multiply<float, uint32_t>& multiply, int bits, Ahead& ahead) {
  multiply_panel_of_words(multiply, bits, ahead);
}

}  // namespace exllama::cpu

#endif
