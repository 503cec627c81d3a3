// A few rows of x by the words of a shuffled weight. It is a source of its own, so that both compile at once.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu::avx2 {

void gemv(const Gemv& gemv);
void vnni_gemv(const Gemv& gemv);

}  // namespace exllama::cpu::avx2
