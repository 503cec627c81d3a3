// The kernels that are written once for all vector widths. Each ISA's header includes this one after its vocabulary:
// Int, Float, kStrip (their lanes of 32 bits), kTallRows, kWideRows, the functions on them, and EXLLAMA_VECTOR, the
// target attribute of all code that uses them. It stands in the anonymous namespace of each source that includes it.
#pragma once

#include "../layout/dispatch.h"

namespace exllama::cpu {
namespace {

constexpr int kStrips = kPanelColumns / kStrip;

// Four bytes in all lanes.
EXLLAMA_VECTOR_INLINE Int broadcast(const void* four_bytes) {
  int32_t value;
  std::memcpy(&value, four_bytes, sizeof value);
  return set_int(value);
}

EXLLAMA_VECTOR_INLINE Int both_halves(Int values) { return bit_or(values, shift_left(values, 16)); }

// --- weights -----------------------------------------------------------------------------------------------------

// False, but not before the template is instantiated.
template <int bits>
constexpr bool kNoSuchWidth = false;

// Of a block of words of a shuffled weight, in a strip of columns: rows 2 p and 2 p + 1, in 16 bits each.
template <int kBits>
EXLLAMA_VECTOR_INLINE Int pair_of(const Int* words, int p) {
  if constexpr (kBits == 8) {
    return byte_pair(words[0], p);
  } else if constexpr (kBits == 3) {
    if (p < 15) return bit_and(shift_right(words[p / 5], p % 5 * 3), set_int(0x00070007));
    // Bit b of the last pair is bits 15 and 31 of word b.
    const Int bit = set_int(0x00010001);
    const Int b0 = bit_and(shift_right(words[0], 15), bit);
    const Int b1 = bit_and(shift_right(words[1], 14), shift_left(bit, 1));
    const Int b2 = bit_and(shift_right(words[2], 13), shift_left(bit, 2));
    return bit_or(bit_or(b0, b1), b2);
  } else if constexpr (kBits == 2 || kBits == 4) {
    return bit_and(shift_right(words[0], kBits * p), set_int(kBits == 4 ? 0x000f000f : 0x00030003));
  } else {
    static_assert(kNoSuchWidth<kBits>, "csrc/cpu has no unpacking of this bit width: add it to pair_of in vectors.h");
  }
}

// The same as quads of bytes, their rows in the order of quad_order.
template <int kBits>
EXLLAMA_VECTOR_INLINE Int quad_of(const Int* words, int p) {
  if constexpr (kBits == 8) {
    return words[0];
  } else if constexpr (kBits == 3) {
    return bit_or(pair_of<3>(words, 2 * p), shift_left(pair_of<3>(words, 2 * p + 1), 8));
  } else if constexpr (kBits == 2 || kBits == 4) {
    return bit_and(shift_right(words[0], kBits * p), set_int(kBits == 4 ? 0x0f0f0f0f : 0x03030303));
  } else {
    static_assert(kNoSuchWidth<kBits>, "csrc/cpu has no quads of this bit width: add them to quad_of in vectors.h");
  }
}

template <int kBits>
EXLLAMA_VECTOR_INLINE void load_block(const uint32_t* block, int64_t N, Mask mask, Int* words) {
  constexpr int kWords = layout::block_words(kBits);
#pragma GCC unroll 3
  for (int w = 0; w < kWords; ++w) words[w] = load_int_masked(block + w * N, mask);
}

// The zero points of a strip of columns of a group; column is a multiple of 4 and the lanes off the mask are zero.
template <int kBits>
EXLLAMA_VECTOR_INLINE Int zeros_of_strip(const Weight& weight, int64_t group, int64_t column, int64_t columns) {
  if (columns <= 0) return set_int(0);
  const int64_t row_words = weight.N * kBits / 32, first = column * kBits / 32;
  const Int words = load_int_masked(weight.qzeros + group * row_words + first, mask_of(row_words - first));
  const Int position = add_int32(multiply_int32(lanes(), set_int(kBits)), set_int(column * kBits % 32));
  const Int word = shift_right(position, 5), from = bit_and(position, set_int(31));
  const Int low = shift_right(permute(words, word), from);
  // A shift by 32 gives zero.
  const Int high = shift_left(permute(words, add_int32(word, set_int(1))), sub_int32(set_int(32), from));
  const Int stored = bit_and(bit_or(low, high), set_int((1 << kBits) - 1));
  return keep(mask_of(columns), add_int32(stored, set_int(weight.zero_offset)));
}

template <int kBits>
EXLLAMA_VECTOR void load_zeros_of(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  for (int n = 0; n < kPanelColumns; n += kStrip) {
    store_int(zeros + n, zeros_of_strip<kBits>(weight, group, column + n, columns - n));
  }
}

inline void load_zeros(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  layout::with_bits(weight.bits, [&](auto bits) { load_zeros_of<bits.value>(weight, group, column, columns, zeros); });
}

EXLLAMA_VECTOR inline void load_scales(const Weight& weight, int64_t group, int64_t column, int columns,
                                       float* scales) {
  for (int n = 0; n < kPanelColumns; n += kStrip) {
    store_floats(scales + n, load_any(weight.scales, weight.scales_dtype, group * weight.N + column + n, columns - n));
  }
}

template <int kBits>
EXLLAMA_VECTOR void unpack_int16_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    const int32_t* zeros, int16_t* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  Int zero[kStrips];
#pragma GCC unroll 8
  for (int v = 0; v < kStrips; ++v) zero[v] = both_halves(load_int(zeros + kStrip * v));
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
#pragma GCC unroll 8
    for (int v = 0; v < kStrips; ++v) {
      Int words[kWords];
      load_block<kBits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        store_int(panel + 2 * (p * kPanelColumns + kStrip * v), sub_int16(pair_of<kBits>(words, p), zero[v]));
      }
    }
  }
}

// 8-bit q do not fit int8 once centered, and q - 128 does: x - 128 flips the highest bit.
template <int kBits>
EXLLAMA_VECTOR void unpack_int8_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                   const int32_t* zeros, int8_t* panel, int32_t* start) {
  constexpr int kWords = layout::block_words(kBits), kQuads = layout::block_values(kBits) / 4;
  const uint32_t* block = words_of(weight, row, column);
  const Int offsets = set_int(static_cast<int32_t>(kInt8Offset * 0x01010101u));
  Int zero[kStrips], sum[kStrips];
#pragma GCC unroll 8
  for (int v = 0; v < kStrips; ++v) {
    const Int twice = both_halves(load_int(zeros + kStrip * v));
    zero[v] = kBits == 8 ? offsets : bit_or(twice, shift_left(twice, 8));
    sum[v] = set_int(0);
  }
  for (int i = 0; i < rows; i += 4 * kQuads, block += kWords * weight.N, panel += 4 * kQuads * kPanelColumns) {
#pragma GCC unroll 8
    for (int v = 0; v < kStrips; ++v) {
      Int words[kWords];
      load_block<kBits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 8
      for (int p = 0; p < kQuads; ++p) {
        const Int centered = sub_int8(quad_of<kBits>(words, p), zero[v]);
        dot_int8(sum[v], offsets, centered);
        store_int(panel + 4 * (p * kPanelColumns + kStrip * v), centered);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kStrips; ++v) store_int(start + kStrip * v, sub_int32(set_int(0), sum[v]));
}

template <int kBits>
EXLLAMA_VECTOR void unpack_float_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
    for (int v = 0; v < kStrips; ++v) {
      const Int zero = both_halves(load_int(zeros + kStrip * v));
      const Float scale = scales ? load_floats(scales + kStrip * v) : set_float(1);
      Int words[kWords];
      load_block<kBits>(block + kStrip * v, weight.N, mask_of(columns - kStrip * v), words);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        const Int value = sub_int16(pair_of<kBits>(words, p), zero);
        float* out = panel + 2 * p * kPanelColumns + kStrip * v;
        store_floats(out, multiply(to_float(shift_right_signed(shift_left(value, 16), 16)), scale));
        store_floats(out + kPanelColumns, multiply(to_float(shift_right_signed(value, 16)), scale));
      }
    }
  }
}

// Whether each value of a shuffled block lies in one field.
constexpr bool has_whole_values(int bits) {
  for (int j = 0; j < layout::block_values(bits); ++j) {
    if (layout::place(bits, j, true).count != 1) return false;
  }
  return true;
}

// A strip is rows here, so its words are one or a few, each for a run of lanes.
template <int kBits>
EXLLAMA_VECTOR void unpack_transposed_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                         const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kValues = layout::block_values(kBits), kWords = layout::block_words(kBits);
  // A strip of 2 and 3 bits is a part of a block, of 4 and 8 bits one or more of them.
  constexpr int kPeriod = kValues > kStrip ? kValues / kStrip : 1;
  constexpr int kMostWords = kStrip / kValues > 2 ? kStrip / kValues : 2;
  const layout::Format& format = layout::kFormat<kBits>;
  const Int mask = set_int((1 << kBits) - 1);
  static_assert(has_whole_values(kBits) || kBits == 3,
                "csrc/cpu has no transposed unpacking of a width whose values cross words: add it here");
  Int shift[kPeriod];
  int first_word[kPeriod], lane_of_word[kPeriod][kMostWords], words[kPeriod];
  for (int part = 0; part < kPeriod; ++part) {
    alignas(64) int32_t shifts[kStrip];
    words[part] = 0;
    for (int lane = 0; lane < kStrip; ++lane) {
      const int value = part * kStrip + lane;
      const layout::Field& field = format.place_of(value % kValues, true).fields[0];
      shifts[lane] = field.shift;
      // The last two values of 3 bits are put together from all words below.
      const bool sliced = kBits == 3 && value >= 30;
      const int word = sliced ? 2 : value / kValues * kWords + field.word;
      if (words[part] == 0) first_word[part] = word;
      if (first_word[part] + words[part] == word) lane_of_word[part][words[part]++] = lane;
    }
    shift[part] = load_int(shifts);
  }
  const int64_t N = weight.N;
  for (int i = 0; i < rows; i += kStrip) {
    const int part = i / kStrip % kPeriod;
    const uint32_t* source = words_of(weight, row + i, column) + first_word[part] * N;
    for (int n = 0; n < columns; ++n) {
      Int value = set_int(static_cast<int32_t>(source[n]));
      for (int w = 1; w < words[part]; ++w) {
        value = join(value, set_int(static_cast<int32_t>(source[w * N + n])), lane_of_word[part][w]);
      }
      value = bit_and(shift_right(value, shift[part]), mask);
      if (kBits == 3 && part == kPeriod - 1) {
        const uint32_t* block = source + n - first_word[part] * N;
        uint32_t low = 0, high = 0;
        for (int b = 0; b < 3; ++b) {
          low |= (block[b * N] >> 15 & 1) << b;
          high |= block[b * N] >> 31 << b;
        }
        value = join(value, set_int(static_cast<int32_t>(low)), kStrip - 2);
        value = join(value, set_int(static_cast<int32_t>(high)), kStrip - 1);
      }
      const Int centered = sub_int32(value, set_int(zeros[n]));
      store_floats(panel + n * kPanelColumns + i, multiply(to_float(centered), set_float(scales[n])));
    }
  }
}

inline void unpack_int16(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                         const int32_t* zeros, int16_t* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_int16(weight, row, rows, column, columns, zeros, panel);
  }
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_int16_of<bits.value>(weight, row, rows, column, columns, zeros, panel);
  });
}

inline void unpack_int8(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                 int8_t* panel, int32_t* start) {
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_int8_of<bits.value>(weight, row, rows, column, columns, zeros, panel, start);
  });
}

inline void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                         const int32_t* zeros, const float* scales, float* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_float(weight, row, rows, column, columns, zeros, scales, panel);
  }
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_float_of<bits.value>(weight, row, rows, column, columns, zeros, scales, panel);
  });
}

inline void unpack_transposed(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                              const int32_t* zeros, const float* scales, float* panel) {
  if (!fills_words(weight, row, rows) || rows % kStrip != 0) {
    return scalar::unpack_transposed(weight, row, rows, column, columns, zeros, scales, panel);
  }
  layout::with_bits(weight.bits, [&](auto bits) {
    unpack_transposed_of<bits.value>(weight, row, rows, column, columns, zeros, scales, panel);
  });
}

// --- products ----------------------------------------------------------------------------------------------------

// How a kind of numbers is multiplied: kDepth rows of the panel in one step, and what becomes of a sum at the end.
template <bool kVnni>
struct Int16Product {
  using Args = Multiply<int16_t, int16_t>;
  using Vector = Int;
  static constexpr int kDepth = 2;

  static EXLLAMA_VECTOR_INLINE Int start(const Args&, int) { return set_int(0); }
  static EXLLAMA_VECTOR_INLINE Int load(const int16_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const int16_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Int& sum, Int weight, Int x) { dot_int16<kVnni>(sum, weight, x); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Int sum, int row, int) {
    return multiply(to_float(sum), set_float(args.x_scales[row].scale[args.limb]));
  }
};

struct Int8Product {
  using Args = Multiply<uint8_t, int8_t>;
  using Vector = Int;
  static constexpr int kDepth = 4;

  static EXLLAMA_VECTOR_INLINE Int start(const Args& args, int column) { return load_int(args.start + column); }
  static EXLLAMA_VECTOR_INLINE Int load(const int8_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const uint8_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Int& sum, Int weight, Int x) { dot_int8(sum, x, weight); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Int sum, int row, int column) {
    const BlockScale& x = args.x_scales[row];
    if (args.zeros) sum = sub_int32(sum, multiply_int32(load_int(args.zeros + column), set_int(x.sum[0])));
    return multiply(to_float(sum), set_float(x.scale[0]));
  }
};

struct FloatProduct {
  using Args = Multiply<float, float>;
  using Vector = Float;
  static constexpr int kDepth = 1;

  static EXLLAMA_VECTOR_INLINE Float start(const Args&, int) { return set_float(0); }
  static EXLLAMA_VECTOR_INLINE Float load(const float* panel) { return load_floats(panel); }
  static EXLLAMA_VECTOR_INLINE Float spread(const float* x) { return set_float(*x); }
  static EXLLAMA_VECTOR_INLINE void add(Float& sum, Float weight, Float x) { sum = fma(x, weight, sum); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args&, Float sum, int, int) { return sum; }
};

// mr rows of x by nr strips of the panel.
//
// The next rows of x and of acc come from L2: their lines, which follow those of this tile, are prefetched one in each
// step of the inner loop.
template <typename Product, int mr, int nr>
EXLLAMA_VECTOR void tile(const typename Product::Args& args, int row, int strip) {
  const int64_t stride = args.x_stride;
  const auto* x = args.x + row * stride;
  const auto* panel = args.panel + Product::kDepth * kStrip * strip;
  typename Product::Vector sum[mr][nr];
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) sum[m][v] = Product::start(args, kStrip * (strip + v));
  }
  // A pointer to every third row: the two that follow it are reached by index registers.
  decltype(x) base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last full tile nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64));
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns);
  for (int k = 0; k < args.depth; k += Product::kDepth, panel += Product::kDepth * kPanelColumns) {
    _mm_prefetch(next_x, _MM_HINT_T0);
    _mm_prefetch(next_acc, _MM_HINT_T0);
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
void tiles(const typename Product::Args& args, int row) {
  if (mr <= kWideRows && args.columns > 2 * kStrip) return tile<Product, mr, kStrips <= 4 ? 4 : 2>(args, row, 0);
  for (int strip = 0; strip * kStrip < args.columns; strip += 2) tile<Product, mr, 2>(args, row, strip);
}

template <typename Product, int mr>
void last_tiles(const typename Product::Args& args, int row) {
  if (args.rows - row == mr) return tiles<Product, mr>(args, row);
  if constexpr (mr > 1) last_tiles<Product, mr - 1>(args, row);
}

template <typename Product>
void multiply_rows(const typename Product::Args& args, Ahead& ahead) {
  int row = 0, shares = (args.rows + kTallRows - 1) / kTallRows;
  for (; args.rows - row >= kTallRows; row += kTallRows) {
    ahead.prefetch(shares--);
    tiles<Product, kTallRows>(args, row);
  }
  if (row == args.rows) return;
  ahead.prefetch(1);
  last_tiles<Product, kTallRows - 1>(args, row);
}

}  // namespace
}  // namespace exllama::cpu
