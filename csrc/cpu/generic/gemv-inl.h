// A few rows of x by the words of a shuffled weight.
//
// DRAM is the limit. 16 columns of 4-bit words are 64 bytes, which take 2 ns at 32 GB/s. AVX-512 unpacks them by 4 ands
// and a shift, and multiplies them by 4 dot products per row of x. So words are read as DRAM likes it best: a few long
// rows at a time, with prefetches into L2 that run ahead of the use. The sums of a span stay in registers, and those of a
// row of x in L2.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/generic/words-inl.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// How far ahead of its use a word is prefetched: 2 KiB of its row.
constexpr int kAheadColumns = 512;
// Rows of words in a batch. Most spans are not longer, and their sums never go to memory. But rows that lie in the same
// sets of L1, as all do where a row is a multiple of 4 KiB, evict one another if they are more than its 8 ways. There
// DRAM reads 26 GB/s in 8 rows and 22 in 16 (Zen 4, 4096 columns of 4 bits). With three vectors or more it is not the
// limit.
constexpr int kMostBatchWords = 16;
inline int batch_words(int64_t N, int vectors) { return N % 1024 == 0 && vectors <= 2 ? 8 : kMostBatchWords; }
// Strips that share a broadcast of x. In runs of 256 bytes, DRAM reads slower than in 128 or 64.
constexpr int nr = 2, kColumnsAtOnce = nr * kStrip;

// What a lane of 32 bits multiplies at once: two int16 or four int8.
enum class Dot { kInt16, kInt16Vnni, kInt8 };
constexpr int depth_of(Dot kind) { return kind == Dot::kInt8 ? 4 : 2; }

// A sum of such products, from `start` on.
template <Dot kind>
EXLLAMA_VECTOR_INLINE auto sum_from(Int start) {
  if constexpr (kind == Dot::kInt8) {
    return start;
  } else {
    return pair_sum(start);
  }
}

// One limb of one row of x in one span.
struct Vector {
  const char* x;
  int32_t sum;
  float scale;
  float* acc;
};

// Blocks of one span: all of them, or what a batch holds.
struct Piece {
  int64_t group;
  int first;  // block of the span
  int blocks;
  bool ends;  // the span
  const Vector* vectors;
};

// Rows of words that are read together: pieces of spans, and some whole ones. Those of the next batch follow in memory.
struct Batch {
  const uint32_t* words;
  int blocks = 0;
  int count = 0;
  Piece pieces[kMostBatchWords];
};

// A range of columns of the result.
struct Columns {
  const Weight& weight;
  int64_t first;
  int count;
  int32_t* dots;  // [vector][stride]: sums of spans that go on in the next batch
  int64_t stride;
};

// How many sums each row of x and strip has, see place_of_pair.
template <int bits, Dot kind, int mr>
constexpr int kPlaces =
    std::min(kGemvVectors / mr, kind == Dot::kInt8 ? most_places_of_quads(bits) : most_places_of_pairs(bits));

// Sums of mr vectors by nr strips, in registers.
template <int bits, Dot kind, int mr, bool masked>
struct Sums {
  static constexpr int P = kPlaces<bits, kind, mr>;
  static constexpr int kWords = layout::block_words(bits), kTerms = layout::block_values(bits) / depth_of(kind);
  // q - 128 of 8 bits, where dot products take signed bytes.
  static constexpr bool kFlips = kSignedDots && kind == Dot::kInt8 && bits == 8;

  decltype(sum_from<kind>(Int())) sum[mr][nr][P];

  // `dots` is null or has where each sum begins.
  EXLLAMA_VECTOR_INLINE void start(const int32_t* dots, int64_t stride) {
#pragma GCC unroll 8
    for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
        sum[m][v][0] = sum_from<kind>(dots ? load_int(dots + m * stride + kStrip * v) : set_int(0));
#pragma GCC unroll 4
        for (int place = 1; place < P; ++place) sum[m][v][place] = sum_from<kind>(set_int(0));
      }
    }
  }

  // A block of words. `terms` are [term][vector], 32 bits each.
  EXLLAMA_VECTOR_INLINE void add(const uint32_t* words, int64_t N, const Mask* mask, const char* terms) {
    Int loaded[nr][kWords];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 3
      for (int w = 0; w < kWords; ++w) {
        const uint32_t* from = words + w * N + kStrip * v;
        loaded[v][w] = masked ? load_int_masked(from, mask[v]) : load_int(from);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; ++t) {
      Int term[nr];
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) {
        term[v] = kind == Dot::kInt8 ? quad_of<bits, P>(loaded[v], t) : pair_of<bits, P>(loaded[v], t);
        if constexpr (kFlips) term[v] = sub_int8(term[v], set_int(static_cast<int32_t>(0x80808080)));
      }
      const int place = kind == Dot::kInt8 ? place_of_quad<bits, P>(t) : place_of_pair<bits, P>(t);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const Int spread = broadcast(terms + 4 * (t * mr + m));
#pragma GCC unroll 2
        for (int v = 0; v < nr; ++v) {
          if constexpr (kind == Dot::kInt8) {
            dot_int8(sum[m][v][place], term[v], spread);
          } else {
            dot_int16<kind == Dot::kInt16Vnni>(sum[m][v][place], term[v], spread);
          }
        }
      }
    }
  }

  EXLLAMA_VECTOR_INLINE Int total(int m, int v) const {
    Int result = whole(sum[m][v][0]);
#pragma GCC unroll 4
    for (int place = 1; place < P; ++place) {
      result = add_int32(result, shift_right_signed(whole(sum[m][v][place]), bits * place));
    }
    return result;
  }

  EXLLAMA_VECTOR_INLINE void store(int32_t* dots, int64_t stride) const {
#pragma GCC unroll 8
    for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < nr; ++v) store_int(dots + m * stride + kStrip * v, total(m, v));
    }
  }

  // acc = fma(float(dot - zero * sum of x) * x_scale, scale, acc), in `count` columns of a group from `column` on.
  EXLLAMA_VECTOR_INLINE void finish(const Weight& weight, int64_t group, int64_t column, int64_t count,
                                    const Vector* vectors, int n) const {
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) {
      const int64_t first = column + kStrip * v, there = masked ? count - kStrip * v : kStrip;
      Int zero =
          masked ? zeros_of_strip<bits>(weight, group, first, there) : zeros_of_whole_strip<bits>(weight, group, first);
      if constexpr (kFlips) zero = sub_int32(zero, set_int(kInt8Offset));
      const Float scale = load_any(weight.scales, weight.scales_dtype, group * weight.N + first, there);
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const Int centered = sub_int32(total(m, v), multiply_int32(zero, set_int(vectors[m].sum)));
        const Float value = multiply(to_float(centered), set_float(vectors[m].scale));
        float* acc = vectors[m].acc + n + kStrip * v;
        store_floats(acc, fma(value, scale, load_floats(acc)));
      }
    }
  }
};

// Vectors [first_vector, first_vector + mr) times columns [begin, end) of a batch, whole strips of them unless masked.
// `x` has the terms of these vectors.
template <int bits, Dot kind, int mr, bool masked>
EXLLAMA_VECTOR void add_batch(const Batch& batch, const Columns& columns, int begin, int end, const char* x,
                              int first_vector) {
  using Sum = Sums<bits, kind, mr, masked>;
  constexpr int kWords = Sum::kWords;
  const Weight& weight = columns.weight;
  const int64_t N = weight.N;
  // A narrow range of columns is prefetched one batch ahead.
  const int lead = static_cast<int>(std::min<int64_t>(kAheadColumns, columns.stride));
  for (int n = begin; n < end; n += kColumnsAtOnce) {
    const bool next = n + lead >= columns.count;
    const uint32_t* words = batch.words + n;
    const uint32_t* ahead = words + lead + (next ? batch.blocks * kWords * N - columns.count : 0);
    const int64_t ahead_column = columns.first + n + lead + (next ? batch.count * N - columns.count : 0);
    int32_t* dots = columns.dots + first_vector * columns.stride + n;
    const char* terms = x;
    Mask mask[nr];
#pragma GCC unroll 2
    for (int v = 0; v < nr; ++v) mask[v] = mask_of(columns.count - n - kStrip * v);
    for (const Piece *piece = batch.pieces, *last = piece + batch.count; piece < last; ++piece) {
      const int64_t index = piece->group * N + ahead_column;
      prefetch_to_l2(weight.qzeros + index * bits / 32);
      prefetch_to_l2(offset(weight.scales, weight.scales_dtype, index));
      Sum sums;
      sums.start(piece->first == 0 ? nullptr : dots, columns.stride);
      for (int i = 0; i < piece->blocks; ++i, words += kWords * N, ahead += kWords * N) {
#pragma GCC unroll 2
        for (int line = 0; line < kColumnsAtOnce; line += 16) {
          for (int w = 0; w < kWords; ++w) prefetch_to_l2(ahead + w * N + line);
        }
        sums.add(words, N, mask, terms);
        terms += 4 * Sum::kTerms * mr;
      }
      if (piece->ends) {
        sums.finish(weight, piece->group, columns.first + n, columns.count - n, piece->vectors + first_vector, n);
      } else {
        sums.store(dots, columns.stride);
      }
    }
  }
}

// `count` vectors, at most mr. What is left of the columns after whole strips goes vector by vector.
template <int bits, Dot kind, int mr>
void add_batch_of(int count, const Batch& batch, const Columns& columns, int begin, int end, const char* x,
                  int first_vector) {
  if (count == mr) return add_batch<bits, kind, mr, false>(batch, columns, begin, end, x, first_vector);
  if constexpr (mr > 1) add_batch_of<bits, kind, mr - 1>(count, batch, columns, begin, end, x, first_vector);
}

// All vectors of a batch, of which each span has `count`.
template <int bits, Dot kind>
void add_vectors(const Batch& batch, const Columns& columns, int count) {
  constexpr int kMostTerms = kMostBatchWords * 32 / bits / depth_of(kind);
  char x[2 * kGemvRows * 4 * kMostTerms];
  const auto terms_of = [&](int first, int mr) {
    char *begin = x + first * 4 * kMostTerms, *to = begin;
    for (int p = 0; p < batch.count; ++p) {
      const Piece& piece = batch.pieces[p];
      const int terms = piece.blocks * layout::block_values(bits) / depth_of(kind);
      for (int m = 0; m < mr; ++m) {
        const char* from = piece.vectors[first + m].x + piece.first * layout::block_values(bits) * 4 / depth_of(kind);
        for (int t = 0; t < terms; ++t) std::memcpy(to + 4 * (t * mr + m), from + 4 * t, 4);
      }
      to += 4 * terms * mr;
    }
    return begin;
  };
  // Even passes. All but the first find the words of 256 columns in L1 or L2.
  const int passes = (count + kGemvVectors - 1) / kGemvVectors;
  const int end = columns.count / kColumnsAtOnce * kColumnsAtOnce, step = passes == 1 ? columns.count : 256;
  const auto first_of = [&](int pass) { return count * pass / passes; };
  for (int n = 0; n < end; n += step) {
    for (int pass = 0; pass < passes; ++pass) {
      const int first = first_of(pass), mr = first_of(pass + 1) - first;
      const char* terms = n == 0 ? terms_of(first, mr) : x + first * 4 * kMostTerms;
      add_batch_of<bits, kind, kGemvVectors>(mr, batch, columns, n, std::min(n + step, end), terms, first);
    }
  }
  if (end == columns.count) return;
  for (int m = 0; m < count; ++m) {
    add_batch<bits, kind, 1, true>(batch, columns, end, columns.count, terms_of(m, 1), m);
  }
}

// Walks down the spans of a weight.
template <int bits, Dot kind>
class Walk {
 public:
  explicit Walk(const Gemv& gemv) : gemv_(gemv), spans_(*gemv.weight, kSpanRows) {}

  void run() {
    for (int64_t s = 0; s < spans_.count(); ++s) add(s);
    next_batch(vectors_, 0);
  }

 private:
  static constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);

  // Puts a span into the batch, and what does not fit into the next ones. A span that would fit into one alone is not
  // divided. One with second limbs shares no batch.
  void add(int64_t s) {
    const Span span = spans_[s];
    Vector* vectors = vectors_ + batch_.count * count_;
    const int count = vectors_of(s, vectors), most = batch_words(gemv_.weight->N, count) / kWords;
    const int blocks = static_cast<int>(span.rows / kValues);
    const bool shares = count == count_ && count == gemv_.rows && (blocks > most || batch_.blocks + blocks <= most);
    if (!shares) vectors = next_batch(vectors, count);
    for (int first = 0; first < blocks;) {
      if (batch_.blocks == most) vectors = next_batch(vectors, count);
      if (batch_.count == 0) batch_.words = words_of(*gemv_.weight, span.row + first * kValues, gemv_.column);
      const int together = std::min(blocks - first, most - batch_.blocks);
      batch_.pieces[batch_.count++] = {span.group, first, together, first + together == blocks, vectors};
      batch_.blocks += together;
      first += together;
    }
  }

  // Multiplies the batch, and begins one with a span of so many vectors.
  Vector* next_batch(const Vector* vectors, int count) {
    if (batch_.count > 0) add_vectors<bits, kind>(batch_, columns_, count_);
    batch_.blocks = batch_.count = 0;
    std::memmove(vectors_, vectors, static_cast<size_t>(count) * sizeof *vectors);
    count_ = count;
    return vectors_;
  }

  // The vectors of a span: rows or up to twice as many. Returns how many.
  int vectors_of(int64_t s, Vector* vectors) const {
    int count = 0;
    for (int m = 0; m < gemv_.rows; ++m) {
      const int64_t entry = s * gemv_.rows + m;
      const SpanScale& scale = gemv_.x_scales[entry];
      const char* x = static_cast<const char*>(gemv_.x) + entry * gemv_.x_stride * (4 / depth_of(kind));
      float* acc = gemv_.acc + m * columns_.stride;
      vectors[count++] = {x, scale.sum[0], scale.scale[0], acc};
      if (scale.limbs == Limbs::kTwo) {
        const int16_t* second = gemv_.x_second + entry * gemv_.x_stride;
        vectors[count++] = {reinterpret_cast<const char*>(second), scale.sum[1], scale.scale[1], acc};
      }
    }
    return count;
  }

  const Gemv& gemv_;
  const Spans spans_;
  // Two limbs for each row at most.
  alignas(64) int32_t dots_[2 * kGemvSums];
  const Columns columns_{*gemv_.weight, gemv_.column, gemv_.columns, dots_, round_up(gemv_.columns, kPanelColumns)};
  Batch batch_;
  int count_ = 0;  // vectors of each span in the batch
  // A batch has a span of each of its rows of words at most, and the span after it is looked at.
  Vector vectors_[(kMostBatchWords + 2) * kGemvRows];
};

template <Dot kind>
void multiply_words(const Gemv& gemv) {
  layout::with_bits(gemv.weight->bits, [&](auto bits) { Walk<bits.value, kind>(gemv).run(); });
}

}  // namespace
}  // namespace exllama::cpu
