#include "cpu/isa/avx512/word_tiles.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx512/vocabulary-inl.h"

#include "cpu/generic/word_tiles-inl.h"

namespace exllama::cpu {

void avx512::vnni_multiply_words(const MultiplyWords& multiply, Ahead& ahead) { multiply_tiles(multiply, ahead); }

}  // namespace exllama::cpu

#endif
