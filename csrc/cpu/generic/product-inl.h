// Products of rows of x by a panel: of int16, of int8 and of float.
#pragma once

#include "cpu/generic/words-inl.h"

namespace exllama::cpu {
namespace {

// Each of the three products says how its numbers are multiplied: kDepth rows of the panel in one step, and what becomes
// of a sum at the end. Where rows are many, it takes kStrips strips at once.
template <bool vnni>
struct Int16Product {
  using Args = Multiply<int16_t, int16_t>;
  using Vector = Int;
  using Sum = PairSum;
  static constexpr int kDepth = 2, kStrips = 2, kRunRows = kSpanRows;

  static EXLLAMA_VECTOR_INLINE Sum start(const Args&, int, int) { return pair_sum(set_int(0)); }
  static EXLLAMA_VECTOR_INLINE Int load(const int16_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const int16_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Sum& sum, Int weight, Int x) { dot_int16<vnni>(sum, weight, x); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Sum sum, int row, int) {
    return multiply(to_float(whole(sum)), set_float(args.x_scales[row].scale[args.limb]));
  }
};

struct Int8Product {
  using Args = Multiply<uint8_t, int8_t>;
  using Vector = Int;
  using Sum = Int;
  static constexpr int kDepth = 4, kStrips = 2, kRunRows = kSpanRows;

  static EXLLAMA_VECTOR_INLINE Int start(const Args& args, int, int column) { return load_int(args.start + column); }
  static EXLLAMA_VECTOR_INLINE Int load(const int8_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const uint8_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Int& sum, Int weight, Int x) { dot_int8(sum, x, weight); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Int sum, int row, int column) {
    const SpanScale& x = args.x_scales[row];
    if (args.zeros) sum = sub_int32(sum, multiply_int32(load_int(args.zeros + column), set_int(x.sum[0])));
    return multiply(to_float(sum), set_float(x.scale[0]));
  }
};

struct FloatProduct {
  using Args = Multiply<float, float>;
  using Vector = Float;
  using Sum = Float;
  static constexpr int kDepth = 1, kStrips = kFloatStrips, kRunRows = kSpanRows;

  static EXLLAMA_VECTOR_INLINE Float start(const Args&, int, int) { return set_float(0); }
  static EXLLAMA_VECTOR_INLINE Float load(const float* panel) { return load_floats(panel); }
  static EXLLAMA_VECTOR_INLINE Float spread(const float* x) { return set_float(*x); }
  static EXLLAMA_VECTOR_INLINE void add(Float& sum, Float weight, Float x) { sum = fma(x, weight, sum); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args&, Float sum, int, int) { return sum; }
};

// Adds rows [begin, end) of the panel to the sums of mr rows of x by nr strips, which stay in registers.
//
// The next rows of x and of acc come from L2. Their lines follow those of these rows, and each step of the inner loop
// prefetches one of both.
template <typename Product, int mr, int nr>
EXLLAMA_VECTOR_INLINE void add_terms(const typename Product::Args& args, int row, int strip, int begin, int end,
                                     typename Product::Sum (&sum)[mr][nr]) {
  const int64_t stride = args.x_stride;
  const auto* x = args.x + row * stride;
  const auto* panel = args.panel + begin * kPanelColumns + Product::kDepth * kStrip * strip;
  // A pointer to every third row: the two that follow it are reached by index registers.
  decltype(x) base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last mr rows nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0, first = begin / Product::kDepth * step;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64)) + first;
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns) + first;
  for (int k = begin; k < end; k += Product::kDepth, panel += Product::kDepth * kPanelColumns) {
    prefetch_to_l1(next_x);
    prefetch_to_l1(next_acc);
    next_x += step;
    next_acc += step;
    typename Product::Vector weight[nr];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) weight[v] = Product::load(panel + Product::kDepth * kStrip * v);
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const auto value = Product::spread(base[m / 3] + m % 3 * stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) Product::add(sum[m][v], weight[v], value);
    }
  }
}

// The same for a whole span, where registers hold the sums of a run of kRunRows rows. Those of a span lie in L1 from one
// run to the next.
template <typename Product, int mr, int nr>
EXLLAMA_VECTOR_INLINE void add_runs(const typename Product::Args& args, int row, int strip,
                                    typename Product::Sum (&sum)[mr][nr]) {
  const bool one_run = args.depth <= Product::kRunRows;
  Int before[mr][nr], run[mr][nr];
#pragma GCC unroll 24
  for (int i = 0; i < mr * nr && !one_run; ++i) store_int(&before[i / nr][i % nr], sum[i / nr][i % nr]);
  for (int begin = 0, end;; begin = end) {
    end = args.depth - begin <= Product::kRunRows ? args.depth : begin + Product::kRunRows;
#pragma GCC unroll 24
    for (int i = 0; i < mr * nr; ++i) run[i / nr][i % nr] = set_int(0);
    add_terms<Product, mr, nr>(args, row, strip, begin, end, run);
    if (end == args.depth) break;
#pragma GCC unroll 24
    for (int i = 0; i < mr * nr; ++i) add_int16_pairs(before[i / nr][i % nr], run[i / nr][i % nr]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < mr * nr; ++i) {
    Int& whole = sum[i / nr][i % nr];
    whole = add_int32(one_run ? whole : before[i / nr][i % nr], int16_pairs(run[i / nr][i % nr]));
  }
}

// mr rows of x by nr strips of the panel.
template <typename Product, int mr, int nr>
EXLLAMA_VECTOR void add_strips(const typename Product::Args& shared, int row, int strip) {
  const typename Product::Args args = shared;  // which no store to acc can change
  typename Product::Sum sum[mr][nr];
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) sum[m][v] = Product::start(args, row + m, kStrip * (strip + v));
  }
  if constexpr (Product::kRunRows < kSpanRows) {
    add_runs<Product, mr, nr>(args, row, strip, sum);
  } else {
    add_terms<Product, mr, nr>(args, row, strip, 0, args.depth, sum);
  }
  Float scale[nr];
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) scale[v] = load_floats(args.scales + kStrip * (strip + v));
  float* acc = args.acc + row * kPanelColumns + kStrip * strip;
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m, acc += kPanelColumns) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) {
      float* out = acc + kStrip * v;
      store_floats(out,
                   fma(Product::value(args, sum[m][v], row + m, kStrip * (strip + v)), scale[v], load_floats(out)));
    }
  }
}

// mr rows by all strips, as many at once as there are registers for.
template <typename Product, int mr>
void add_rows(const typename Product::Args& args, int row) {
  if (mr <= kWideRows && args.columns > 2 * kStrip) {
    return add_strips<Product, mr, kPanelColumns / kStrip <= 4 ? 4 : 2>(args, row, 0);
  }
  for (int strip = 0; strip * kStrip < args.columns; strip += Product::kStrips) {
    add_strips<Product, mr, Product::kStrips>(args, row, strip);
  }
}

// The rows from `row` on, at most mr.
template <typename Product, int mr>
void add_last_rows(const typename Product::Args& args, int row) {
  if (args.rows - row == mr) return add_rows<Product, mr>(args, row);
  if constexpr (mr > 1) add_last_rows<Product, mr - 1>(args, row);
}

template <typename Product>
void multiply_rows(const typename Product::Args& args, Ahead& ahead) {
  int row = 0, shares = (args.rows + kTallRows - 1) / kTallRows;
  for (; args.rows - row >= kTallRows; row += kTallRows) {
    ahead.prefetch(shares--);
    add_rows<Product, kTallRows>(args, row);
  }
  if (row == args.rows) return;
  ahead.prefetch(1);
  add_last_rows<Product, kTallRows - 1>(args, row);
}

}  // namespace
}  // namespace exllama::cpu
