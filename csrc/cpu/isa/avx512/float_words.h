// Rows of x by the words of a shuffled weight, in float. It is a source of its own, so that all compile at once.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu::avx512 {

void gemv_float(const Gemv& gemv);
void multiply_float_words(const Multiply<float, uint32_t>& multiply, int bits, Ahead& ahead);

}  // namespace exllama::cpu::avx512
