// Some rows of x by one panel: what the classes of numbers add up.
#pragma once

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/gemm/packed_x.h"
#include "cpu/gemm/partition.h"
#include "cpu/gemm/plan.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace exllama::cpu {

// acc (rows, kPanelColumns) += rows [row, row + rows) of x, in a span, by the panel of that span and some columns.
struct PanelSums {
  const Weight& weight;
  int64_t span_index;
  Span span;
  int64_t row;
  int rows;
  int64_t column;
  int columns;
  float* acc;
};

// x as it is: for the highest precision, and for a raw g_idx with any precision.
class FloatClass {
 public:
  FloatClass(const Kernels& isa, const PackedX& x, const Plan& plan) : isa_(isa), x_(x), plan_(plan) {}

  void add(const PanelSums& sums, Ahead& ahead) const;

 private:
  void add_words(const PanelSums& sums, Ahead& ahead) const;

  const Kernels& isa_;
  const PackedX& x_;
  const Plan& plan_;
};

// Rows of x that are multiplied alike in one span: limb 0 or 1 of their integers.
struct Run {
  int first;
  int count;
  int limb;
};

struct Runs {
  Run runs[2 * kTileRows];
  int count = 0;
  bool all_finite = true;

  const Run* begin() const { return runs; }
  const Run* end() const { return runs + count; }
};

// x as one or two limbs of integers with power-of-two scales, see Kernels::quantize. What has NaN or inf in a span is
// multiplied as float there.
class IntegerClass {
 public:
  IntegerClass(const Kernels& isa, const PackedX& x, const Source& source, const Plan& plan)
      : isa_(isa), x_(x), source_(source), plan_(plan) {}

  // The longest runs of rows whose limbs match.
  void find_runs(int64_t span_index, int64_t row, int rows, Runs& found) const;
  void add(const PanelSums& sums, const Runs& runs, Ahead& ahead) const;

 private:
  struct Columns;  // zero points and scales

  void add_words(const PanelSums& sums, const Runs& runs, const Columns& columns, Ahead& ahead) const;
  void add_int16(const PanelSums& sums, const Runs& runs, const Columns& columns, Ahead& ahead) const;
  void add_int8(const PanelSums& sums, const Runs& runs, Columns& columns, Ahead& ahead) const;
  void add_not_finite(const PanelSums& sums, const Columns& columns) const;

  const Kernels& isa_;
  const PackedX& x_;
  const Source& source_;
  const Plan& plan_;
};

}  // namespace exllama::cpu
