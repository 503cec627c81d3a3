// The table for NEON, which every aarch64 CPU has.
#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#define EXLLAMA_VECTOR
#define EXLLAMA_HAS_DOTPROD 0
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/table-inl.h"
#include "cpu/isa/neon/float_words.h"
#include "cpu/isa/neon/gemv.h"

namespace exllama::cpu {

const Kernels& neon::kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<false>();
    made.name = "neon";
    made.available = [] { return true; };
    made.gemv = neon::gemv;
    made.gemv_float = neon::gemv_float;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
