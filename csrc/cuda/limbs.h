// W as the exact sum of numbers of 16 bits, its limbs, by which a BLAS multiplies it without rounding it.
//
// W is q - z times a scale: an integer of up to `bits` bits, or 2**bits itself, times a number of 16 bits. The first
// limb is W / 2**shift, rounded. What is left of it, times 2**step, is rounded to the next limb. So
//
//   W = 2**shift * (limb 0 + 2**-step * limb 1 + 2**(-2 * step) * limb 2)
//
// A float16 has 11 significant bits. |q - z| is at most 2**bits, so that W / 2**bits is in its range. It is a multiple of
// 2**(-24 - bits) and has up to 8 + 11 bits. What the first limb leaves of it has eight bits, and times 2**11 it is a
// multiple of 2**-21: a float16. A bfloat16 has 8 significant bits and the range of float32. Two limbs hold 17 bits,
// since the second has a sign of its own, and three hold 26.
#pragma once

#include "problem.h"

namespace exllama::cuda {

inline constexpr int kMaxLimbs = 3;

struct Limbs {
  int32_t count;  // 0 where W is no such sum
  int32_t step;
  int32_t shift;
};

constexpr Limbs limbs_of(DType dtype, DType scales_dtype, int32_t bits) {
  if (scales_dtype == DType::kFloat32 || dtype == DType::kFloat32) return {0, 0, 0};
  if (dtype == DType::kFloat16) return {scales_dtype == DType::kFloat16 ? 2 : 0, 11, bits};
  const int32_t significant = bits + (scales_dtype == DType::kFloat16 ? 11 : 8);
  return {significant <= 17 ? 2 : 3, 8, 0};
}

}  // namespace exllama::cuda
