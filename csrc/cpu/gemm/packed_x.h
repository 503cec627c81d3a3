// x span by span, as the kernels multiply it.
#pragma once

#include <cstdint>

#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/plan.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// x as the op takes it, with K columns. Row k of the words is multiplied with column perm[k], or k, or zeros where
// perm[k] is -1.
struct Source {
  const void* x;
  DType dtype;
  int64_t M;
  int64_t K;
  const int32_t* perm;

  const void* row(int64_t m) const { return offset(x, dtype, m * K); }
};

// Entry (span, row of x) of each array is at span * M + row, and has `stride` values.
struct PackedX {
  int64_t M;
  int64_t stride;
  // Limbs of integers. With Plan::two_bytes, the two bytes of a limb lie in its place, as MultiplyBytes has them.
  int16_t* first = nullptr;
  int16_t* second = nullptr;
  uint8_t* bytes = nullptr;
  SpanScale* scales = nullptr;
  float* floats = nullptr;

  // Takes the arrays of a class, whatever plan is made for it.
  PackedX(Arena& arena, const Weight& weight, int64_t M, NumberClass numbers);

  int64_t entry(int64_t span, int64_t m) const { return span * M + m; }
};

// Rows of W that a matrix unit multiplies at once.
int unit_step(const MatrixUnit& unit, const Weight& weight);

class XPacker {
 public:
  XPacker(const Kernels& isa, const Source& source, const Plan& plan, const Weight& weight, const PackedX& packed)
      : isa_(isa), source_(source), plan_(plan), bits_(weight.bits), spans_(weight, kSpanRows), packed_(packed) {}

  // Row m of x in some spans.
  void pack(int64_t m, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) pack(m, i, spans_[i]);
  }

 private:
  void pack(int64_t m, int64_t index, const Span& span) const;
  void pack_two_bytes(const int16_t* limb, int16_t* out) const;

  const Kernels& isa_;
  const Source& source_;
  const Plan plan_;
  const int bits_;
  const Spans spans_;
  const PackedX& packed_;
};

}  // namespace exllama::cpu
