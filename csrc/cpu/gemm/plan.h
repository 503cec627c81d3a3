// How a product is computed. It is chosen once, before anything is packed or multiplied.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// The numbers that are multiplied: x as it is, or limbs of at most 32767 or 127.
enum class NumberClass { kFloat, kInt16, kInt8 };

inline NumberClass class_of(const Weight& weight, Precision precision) {
  if (precision == Precision::kHighest || !Spans::grouped(weight)) return NumberClass::kFloat;
  return precision == Precision::kHigh ? NumberClass::kInt16 : NumberClass::kInt8;
}

struct Plan {
  NumberClass numbers;
  bool gemv;               // few rows, straight from the words
  const MatrixUnit* unit;  // or null, for vectors
  bool words;              // panels are not unpacked into memory
  bool int8;               // limb 0 is multiplied as bytes
  bool two_bytes;          // limbs of int16 are packed as two bytes
  bool float_words;        // floats are multiplied by panels of words
};

inline Plan plan_of(const Kernels& isa, const Weight& weight, NumberClass numbers, int64_t M) {
  const int values = layout::block_values(weight.bits);
  const bool whole_words = weight.shuffled && (weight.group_size % values == 0 || weight.group_size >= weight.K);
  const bool integers = numbers != NumberClass::kFloat && whole_words;
  Plan plan{numbers, false, nullptr, false, false, false, false};
  plan.gemv = whole_words && M <= kGemvRows && (integers ? isa.gemv : isa.gemv_float);
  plan.unit = integers && !plan.gemv ? isa.matrix_unit : nullptr;
  plan.words = integers && !plan.gemv && !plan.unit && isa.multiply_words && M <= kWordRows;
  const bool bytes = plan.gemv ? isa.gemv_int8 : has_int8_panel(isa.int8_panels, weight.bits);
  plan.int8 = integers && numbers == NumberClass::kInt8 && bytes;
  plan.two_bytes = numbers == NumberClass::kInt16 && (plan.unit || (plan.gemv && isa.gemv_takes_bytes));
  plan.float_words = numbers == NumberClass::kFloat && whole_words && M <= kFloatWordsRows && isa.multiply_float_words;
  return plan;
}

}  // namespace exllama::cpu
