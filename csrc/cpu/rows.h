// Rows of any weight in plain C++: any order, any groups, any range of columns.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu {

// Row k of q, for `columns` columns from `column` on.
void unpack_row(const uint32_t* qweight, int64_t N, int bits, bool shuffled, int64_t k, int64_t column, int columns,
                int32_t* out);

// The float panel scale * (q - z) of a span. `group` is the span's; it is not looked at where each row has its own (raw
// g_idx).
void unpack_scaled(const Kernels& isa, const Weight& weight, int64_t row, int rows, int64_t group, int64_t column,
                   int columns, float* panel);

}  // namespace exllama::cpu
