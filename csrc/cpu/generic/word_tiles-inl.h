// Some rows of x by the words of a panel, which are unpacked in registers.
//
// A panel in memory takes a store of each of its vectors, and Zen 4 stores one in two cycles. With few rows of x that is
// dear. Here each pass over mr rows unpacks the words again, by an and and a shift for each vector. Zen 4 has ports for
// them on which no dot product runs.
//
// Nothing is prefetched into L1: a prefetch for each line of words made the int8 tiles 8% slower.
#pragma once

#include "cpu/generic/words-inl.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// What a lane of 32 bits multiplies at once: two int16 or four int8.
struct Pairs {
  using Sum = PairSum;
  static constexpr int kDepth = 2;

  static EXLLAMA_VECTOR_INLINE Sum zero() { return pair_sum(set_int(0)); }
  template <int bits>
  static EXLLAMA_VECTOR_INLINE Int term(const Int* words, int t) {
    return pair_of<bits>(words, t);
  }
  static EXLLAMA_VECTOR_INLINE void add(Sum& sum, Int weight, Int x) { dot_int16<true>(sum, weight, x); }
  static EXLLAMA_VECTOR_INLINE Int end(Sum sum) { return whole(sum); }
};

struct Quads {
  using Sum = Int;
  static constexpr int kDepth = 4;

  static EXLLAMA_VECTOR_INLINE Sum zero() { return set_int(0); }
  template <int bits>
  static EXLLAMA_VECTOR_INLINE Int term(const Int* words, int t) {
    return quad_of<bits>(words, t);
  }
  static EXLLAMA_VECTOR_INLINE void add(Sum& sum, Int weight, Int x) { dot_int8(sum, weight, x); }
  static EXLLAMA_VECTOR_INLINE Int end(Sum sum) { return sum; }
};

// mr rows of x by two strips of columns, whose words are given and whose sums stay in registers for the whole span.
template <typename Numbers, int bits, int mr>
EXLLAMA_VECTOR void add_tile(const MultiplyWords& args, const uint32_t* words, int row, int strip) {
  constexpr int kWords = layout::block_words(bits), kValues = layout::block_values(bits);
  constexpr int kTerms = kValues / Numbers::kDepth, nr = 2;
  const int64_t N = args.weight->N, stride = args.x_stride;
  const char* x = static_cast<const char*>(args.x) + row * stride;
  float* acc = args.acc + row * kPanelColumns + kStrip * strip;
  typename Numbers::Sum sum[mr][nr];
  Mask mask[nr];
#pragma GCC unroll 2
  for (int v = 0; v < nr; ++v) {
    mask[v] = mask_of(args.columns - kStrip * (strip + v));
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) sum[m][v] = Numbers::zero();
  }
  // A pointer to every third row: the two that follow it are reached by index registers.
  const char* base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  int64_t x_byte = 0;
  for (int k = 0; k < args.depth; k += kValues, words += kWords * N, x_byte += 4 * kTerms) {
    Int loaded[nr][kWords];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) load_block<bits>(words + kStrip * v, N, mask[v], loaded[v]);
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; ++t) {
      Int term[nr];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) term[v] = Numbers::template term<bits>(loaded[v], t);
#pragma GCC unroll 12
      for (int m = 0; m < mr; ++m) {
        const Int spread = broadcast(base[m / 3] + m % 3 * stride + x_byte + 4 * t);
#pragma GCC unroll 2
        for (int v = 0; v < nr; ++v) Numbers::add(sum[m][v], term[v], spread);
      }
    }
  }
  const SpanScale* x_scales = args.x_scales + row;
  const int limb = args.limb;
#pragma GCC unroll 2
  for (int v = 0; v < nr; ++v) {
    const Int zero = load_int(args.zeros + kStrip * (strip + v));
    const Float scale = load_floats(args.scales + kStrip * (strip + v));
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const Int centered = sub_int32(Numbers::end(sum[m][v]), multiply_int32(zero, set_int(x_scales[m].sum[limb])));
      float* out = acc + m * kPanelColumns + kStrip * v;
      const Float value = multiply(to_float(centered), set_float(x_scales[m].scale[limb]));
      store_floats(out, fma(value, scale, load_floats(out)));
    }
  }
}

// `count` rows, at most mr.
template <typename Numbers, int bits, int mr>
void add_tile_of(int count, const MultiplyWords& args, const uint32_t* words, int row, int strip) {
  if (count == mr) return add_tile<Numbers, bits, mr>(args, words, row, strip);
  if constexpr (mr > 1) add_tile_of<Numbers, bits, mr - 1>(count, args, words, row, strip);
}

template <typename Numbers, int bits>
void add_tiles(const MultiplyWords& args, Ahead& ahead) {
  const uint32_t* words = args.weight->qweight + args.row * bits / 32 * args.weight->N + args.column;
  const int strips = static_cast<int>(ceil_div(args.columns, kStrip));
  // Passes are even: more rows share a vector of weights than in a short last pass.
  const int passes = static_cast<int>(ceil_div(args.rows, kTallRows));
  for (int pass = 0, shares = passes * ((strips + 1) / 2); pass < passes; ++pass) {
    const int row = args.rows * pass / passes, end = args.rows * (pass + 1) / passes;
    for (int strip = 0; strip < strips; strip += 2) {
      ahead.prefetch(shares--);
      add_tile_of<Numbers, bits, kTallRows>(end - row, args, words + kStrip * strip, row, strip);
    }
  }
}

inline void multiply_tiles(const MultiplyWords& args, Ahead& ahead) {
  layout::with_bits(args.weight->bits, [&](auto bits) {
    if (args.int8) return add_tiles<Quads, bits.value>(args, ahead);
    add_tiles<Pairs, bits.value>(args, ahead);
  });
}

}  // namespace
}  // namespace exllama::cpu
