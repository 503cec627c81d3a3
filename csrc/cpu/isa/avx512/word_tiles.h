// Rows of x by the words of a panel. It is a source of its own, so that both compile at once.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu::avx512 {

void vnni_multiply_words(const MultiplyWords& multiply, Ahead& ahead);

}  // namespace exllama::cpu::avx512
