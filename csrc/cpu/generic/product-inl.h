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
  static constexpr int kDepth = 2, kStrips = 2;

  static EXLLAMA_VECTOR_INLINE Sum start(const Args&, int) { return pair_sum(set_int(0)); }
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
  static constexpr int kDepth = 4, kStrips = 2;

  static EXLLAMA_VECTOR_INLINE Int start(const Args& args, int column) { return load_int(args.start + column); }
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
  static constexpr int kDepth = 1, kStrips = kFloatStrips;

  static EXLLAMA_VECTOR_INLINE Float start(const Args&, int) { return set_float(0); }
  static EXLLAMA_VECTOR_INLINE Float load(const float* panel) { return load_floats(panel); }
  static EXLLAMA_VECTOR_INLINE Float spread(const float* x) { return set_float(*x); }
  static EXLLAMA_VECTOR_INLINE void add(Float& sum, Float weight, Float x) { sum = fma(x, weight, sum); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args&, Float sum, int, int) { return sum; }
};

// mr rows of x by nr strips of the panel, whose sums stay in registers.
//
// The next rows of x and of acc come from L2. Their lines follow those of these rows, and each step of the inner loop
// prefetches one of both.
template <typename Product, int mr, int nr>
EXLLAMA_VECTOR void add_strips(const typename Product::Args& args, int row, int strip) {
  const int64_t stride = args.x_stride;
  const auto* x = args.x + row * stride;
  const auto* panel = args.panel + Product::kDepth * kStrip * strip;
  typename Product::Sum sum[mr][nr];
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) sum[m][v] = Product::start(args, kStrip * (strip + v));
  }
  // A pointer to every third row: the two that follow it are reached by index registers.
  decltype(x) base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last mr rows nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64));
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns);
  for (int k = 0; k < args.depth; k += Product::kDepth, panel += Product::kDepth * kPanelColumns) {
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
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
    const int column = kStrip * (strip + v);
    const Float scale = load_floats(args.scales + column);
    float* acc = args.acc + row * kPanelColumns + column;
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m, acc += kPanelColumns) {
      store_floats(acc, fma(Product::value(args, sum[m][v], row + m, column), scale, load_floats(acc)));
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
