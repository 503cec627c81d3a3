// Elements whose float32 sum is not finite, computed again in double, as the reference computes all of them.
//
// float32 can overflow on the way to a result that it has: |W| reaches 2^136, and the sums of groups may cancel. A sum
// that was inf or NaN once is so at its end, where Kernels::store finds it. In double no sum of finite terms overflows.
// One function and one order of terms serve all ISAs, so that the bits depend on the terms alone.
//
// A term takes 0.7 ns in gemm and 2 ns in gemm_dx (Zen 4), some 60 times as long as in float32. Rows with NaN are left
// as they are. In rows with inf only the infinite terms count, so that these stay within 8 times their usual time.
#pragma once

#include "cpu/cpu.h"

namespace exllama::cpu {

// A row of x, or of grad.
class ExactRow {
 public:
  // The row has `count` values. perm says where those of the words' rows lie, or is null.
  ExactRow(const void* values, DType dtype, const int32_t* perm, int64_t count);

  // Both write the results, at most kPanelColumns, whose sums in float32 are not finite.
  // out[n] = the row times column `column` + n of W.
  void multiply(const Weight& weight, int64_t column, int columns, const float* sums, void* out) const;
  // dx[row k of the checkpoint] = the row times row k of W, from `row` on.
  void multiply_transposed(const Weight& weight, int64_t row, int rows, const float* sums, void* dx) const;

 private:
  // Whether a term counts: where a value is infinite, so is the sum, and nothing finite changes it.
  bool counts(float value, bool scale_is_finite) const;

  const void* values_;
  DType dtype_;
  const int32_t* perm_;
  bool has_nan_ = false, has_inf_ = false;
};

}  // namespace exllama::cpu
