// A few rows of x, as bytes, by the words of a shuffled weight, with dotprod.
//
// An int16 x is two bytes, x = 256 * high + low: sdot multiplies the signed high one, and udot the unsigned low one. Both
// take q as it is, but sdot takes q - 128 of 8 bits.
#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#include "cpu/isa/neon/targets.h"

#define EXLLAMA_VECTOR EXLLAMA_NEON_DOTPROD
#define EXLLAMA_HAS_DOTPROD 1
#include "cpu/isa/neon/vocabulary-inl.h"

#include <algorithm>
#include <cstring>

#include "cpu/generic/words-inl.h"
#include "cpu/isa/neon/gemv.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 1 KiB of its row.
constexpr int kAheadColumns = 256;
// Columns whose words are a line.
constexpr int kLineColumns = 16;

// Bytes of x, and thereby rows, whose sums stay in registers together.
constexpr int kMostBytes = 8;
template <bool two_bytes>
constexpr int kMostRows = two_bytes ? kMostBytes / 2 : kMostBytes;
// Strips that share the loads of x: with those of so many rows 16 sums at most.
template <bool two_bytes, int mr>
constexpr int kStripsOfRows = (two_bytes ? 2 : 1) * mr <= 4 ? 4 : 2;

// One limb of one row of x in one span.
struct Vector {
  const int8_t* x;
  int32_t sum;
  int32_t offset;  // 128 times the sum of what sdot multiplies, of 8 bits
  float scale;
  float* acc;
};

// A span, and some columns of its words.
struct Place {
  const Weight& weight;
  int64_t group;
  int blocks;
  const uint32_t* words;
  const uint32_t* ahead;  // or null, if another pass prefetches
  int64_t column;         // of W
  int n;                  // of acc
};

template <int lane, bool low>
EXLLAMA_VECTOR_INLINE void add_product(Int& sum, Int q, Int x) {
  if constexpr (low) {
    asm("udot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(q), "w"(x), "i"(lane));
  } else {
    asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(q), "w"(x), "i"(lane));
  }
}

// sum[i] += a quad of rows of q times that of byte i of x, for all bytes from the first one on.
template <bool two_bytes, int bytes, int first = 0>
EXLLAMA_VECTOR_INLINE void add_quads(Int* sum, Int q, Int signed_q, const Int* x) {
  if constexpr (first < bytes) {
    constexpr bool low = two_bytes && first % 2 == 1;
    add_product<first % 4, low>(sum[first], low ? q : signed_q, x[first / 4]);
    add_quads<two_bytes, bytes, first + 1>(sum, q, signed_q, x);
  }
}

// acc = fma(float(dot - zero * sum of x) * x_scale, scale, acc) for mr rows of x and nr strips. `terms` has a quad of each
// byte of x, as [quad][row][byte].
template <int bits, bool two_bytes, int mr, int nr>
EXLLAMA_VECTOR void add_span(const Place& place, const Vector* vectors, const int32_t* terms) {
  constexpr int kWords = layout::block_words(bits), kQuads = layout::block_values(bits) / 4;
  constexpr int kBytes = two_bytes ? 2 : 1, kTerms = mr * kBytes, kLoads = (kTerms + 3) / 4;
  const Weight& weight = place.weight;
  const int64_t N = weight.N;
  const uint32_t *words = place.words, *ahead = place.ahead;
  const Int flip = set_int(static_cast<int32_t>(0x80808080));
  Int sum[nr][kTerms];
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < kTerms; ++i) sum[v][i] = set_int(0);
  }
  for (int block = 0; block < place.blocks; ++block, words += kWords * N) {
    if (ahead) {
      for (int w = 0; w < kWords; ++w) prefetch_to_l1(ahead + w * N);
      ahead += kWords * N;
    }
    Int loaded[nr][kWords];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) load_block<bits>(words + kStrip * v, N, kStrip, loaded[v]);
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad, terms += kTerms) {
      Int x[kLoads];
#pragma GCC unroll 2
      for (int i = 0; i < kLoads; ++i) x[i] = load_int(terms + 4 * i);
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) {
        const Int q = quad_of<bits>(loaded[v], quad);
        add_quads<two_bytes, kTerms>(sum[v], q, bits == 8 ? sub_int8(q, flip) : q, x);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
    const int64_t column = place.column + kStrip * v;
    const Int zero = zeros_of_strip<bits>(weight, place.group, column, kStrip);
    const Float scale = load_any(weight.scales, weight.scales_dtype, place.group * N + column, kStrip);
#pragma GCC unroll 8
    for (int m = 0; m < mr; ++m) {
      const Vector& vector = vectors[m];
      Int dot = sum[v][m * kBytes];
      if (two_bytes) dot = add_int32(shift_left(dot, 8), sum[v][m * kBytes + kBytes - 1]);
      if (bits == 8) dot = add_int32(dot, set_int(vector.offset));
      const Int centered = sub_int32(dot, multiply_int32(zero, set_int(vector.sum)));
      float* acc = vector.acc + place.n + kStrip * v;
      store_floats(acc, fma(multiply(to_float(centered), set_float(vector.scale)), scale, load_floats(acc)));
    }
  }
}

// The columns of a line, as far as they are there.
template <int bits, bool two_bytes, int mr>
void add_line(Place place, int columns, const Vector* vectors, const int32_t* terms) {
  constexpr int nr = kStripsOfRows<two_bytes, mr>;
  while (columns > 0) {
    const int width = columns >= kStrip * nr ? kStrip * nr : kStrip;
    if (width == kStrip) {
      add_span<bits, two_bytes, mr, 1>(place, vectors, terms);
    } else {
      add_span<bits, two_bytes, mr, nr>(place, vectors, terms);
    }
    place.words += width;
    place.ahead = nullptr;
    place.column += width;
    place.n += width;
    columns -= width;
  }
}

// `count` vectors, at most mr.
template <int bits, bool two_bytes, int mr>
void add_line_of(int count, const Place& place, int columns, const Vector* vectors, const int32_t* terms) {
  if (count == mr) return add_line<bits, two_bytes, mr>(place, columns, vectors, terms);
  if constexpr (mr > 1) add_line_of<bits, two_bytes, mr - 1>(count, place, columns, vectors, terms);
}

// The vectors of a span: one or two limbs of each row of x.
template <int bits, bool two_bytes>
int vectors_of(const Gemv& gemv, int64_t span, int rows, Vector* vectors) {
  constexpr int kBytes = two_bytes ? 2 : 1;
  int count = 0;
  for (int m = 0; m < gemv.rows; ++m) {
    const int64_t entry = span * gemv.rows + m;
    const SpanScale& scale = gemv.x_scales[entry];
    for (int limb = 0; limb < (scale.limbs == Limbs::kTwo ? 2 : 1); ++limb) {
      const void* x = limb == 0 ? gemv.x : gemv.x_second;
      Vector& vector = vectors[count++];
      vector = {static_cast<const int8_t*>(x) + entry * gemv.x_stride * kBytes, scale.sum[limb], 0, scale.scale[limb],
                gemv.acc + m * round_up(gemv.columns, kPanelColumns)};
      if (bits == 8) {
        for (int k = 0; k < rows; ++k) vector.offset += 128 * vector.x[k];
        if (two_bytes) vector.offset *= 256;
      }
    }
  }
  return count;
}

template <int bits, bool two_bytes>
void run(const Gemv& gemv) {
  constexpr int kBytes = two_bytes ? 2 : 1, kWords = layout::block_words(bits), mr = kMostRows<two_bytes>;
  const Weight& weight = *gemv.weight;
  const Spans spans(weight, kSpanRows);
  // 16 bytes are loaded where there may be fewer.
  int32_t terms[kSpanRows / 4 * 2 * kGemvRows * 2 + 4];
  Vector vectors[2 * kGemvRows];
  for (int64_t s = 0; s < spans.count(); ++s) {
    const Span span = spans[s];
    const int count = vectors_of<bits, two_bytes>(gemv, s, span.rows, vectors);
    // Even passes: the words of all but the first come from L1.
    const int passes = (count + mr - 1) / mr;
    const auto first = [=](int pass) { return count * pass / passes; };
    for (int pass = 0; pass < passes; ++pass) {
      int32_t* term = terms + span.rows / 4 * kBytes * first(pass);
      for (int k = 0; k < span.rows; k += 4) {
        for (int m = first(pass); m < first(pass + 1); ++m) {
          for (int byte = 0; byte < kBytes; ++byte) {
            std::memcpy(term++, vectors[m].x + byte * gemv.x_stride + k, sizeof *term);
          }
        }
      }
    }
    const int blocks = span.rows / layout::block_values(bits);
    const uint32_t* words = words_of(weight, span.row, gemv.column);
    const uint32_t* next = s + 1 < spans.count() ? words + blocks * kWords * weight.N : words;
    for (int n = 0; n < gemv.columns; n += kLineColumns) {
      const int from = n + kAheadColumns;
      const uint32_t* ahead = from < gemv.columns ? words + from : next + (from - gemv.columns);
      const int columns = std::min(kLineColumns, gemv.columns - n);
      for (int pass = 0; pass < passes; ++pass) {
        const Place place{weight, span.group, blocks, words + n, pass == 0 ? ahead : nullptr, gemv.column + n, n};
        add_line_of<bits, two_bytes, mr>(first(pass + 1) - first(pass), place, columns, vectors + first(pass),
                                         terms + span.rows / 4 * kBytes * first(pass));
      }
    }
  }
}

}  // namespace

void neon::dotprod_gemv(const Gemv& gemv) {
  layout::with_bits(gemv.weight->bits, [&](auto bits) {
    if (gemv.int8) return run<bits.value, false>(gemv);
    run<bits.value, true>(gemv);
  });
}

}  // namespace exllama::cpu

#endif
