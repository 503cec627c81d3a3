// A float panel of any weight.
#pragma once

#include "kernels.h"

namespace exllama::cpu {

// scale * (q - z) of a block. `group` is the block's, or not looked at where each row has its own (raw g_idx).
void unpack_scaled(const Kernels& isa, const Weight& weight, int64_t row, int rows, int64_t group, int64_t column,
                   int columns, float* panel);

}  // namespace exllama::cpu
