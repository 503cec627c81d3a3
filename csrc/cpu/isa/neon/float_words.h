// A few rows of x by the words of a shuffled weight, in float. It is a source of its own, so that all compile at once.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu::neon {

void gemv_float(const Gemv& gemv);

}  // namespace exllama::cpu::neon
