// Transposed panels, for gemm_dx: a strip of lanes is rows of W here, so its words are one or a few, each for a run of
// lanes.
#pragma once

#include "cpu/generic/words-inl.h"
#include "cpu/isa/scalar/kernels.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// How many of the last values of a shuffled block lie in several words, or -1 if any other value does.
constexpr int sliced_values(int bits) {
  int sliced = 0;
  for (int j = 0; j < layout::block_values(bits); ++j) {
    if (layout::place(bits, j, true).count > 1) {
      ++sliced;
    } else if (sliced > 0) {
      return -1;
    }
  }
  return sliced;
}

// Where the lanes of a strip of rows lie: the words, each for a run of lanes, and the shifts in them.
template <int bits>
struct StripOfRows {
  static constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  static constexpr int kMostWords = kStrip / kValues > kWords ? kStrip / kValues : kWords;

  alignas(64) int32_t shifts[kStrip] = {};
  int first_word = 0;
  int words = 0;
  int first_lane[kMostWords] = {};  // of each word

  // `first_value` is that of lane 0 in its block.
  constexpr explicit StripOfRows(int first_value = 0) {
    for (int lane = 0; lane < kStrip; ++lane) {
      const int value = first_value + lane;
      const layout::Place& place = layout::kFormat<bits>.place_of(value % kValues, true);
      shifts[lane] = place.fields[0].shift;
      // Sliced values are read apart from all words. Until then they pass for values of the last one.
      const int word = place.count > 1 ? kWords - 1 : value / kValues * kWords + place.fields[0].word;
      if (words == 0) first_word = word;
      if (first_word + words == word) first_lane[words++] = lane;
    }
  }
};

// The strips of a block of values, or the one strip that holds some blocks.
template <int bits>
struct StripsOfBlock {
  static constexpr int kCount = layout::block_values(bits) > kStrip ? layout::block_values(bits) / kStrip : 1;

  StripOfRows<bits> strips[kCount];

  constexpr StripsOfBlock() {
    for (int i = 0; i < kCount; ++i) strips[i] = StripOfRows<bits>(i * kStrip);
  }
};

template <int bits>
EXLLAMA_VECTOR void unpack_transposed_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                         const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kValues = layout::block_values(bits), kSliced = sliced_values(bits);
  static_assert(kSliced == 0 || (kSliced > 0 && kSliced <= kStrip && kValues % kStrip == 0),
                "csrc/cpu has no transposed unpacking of a width whose first values cross words: add it to "
                "unpack_transposed_of in transposed-inl.h");
  static constexpr StripsOfBlock<bits> kStripsOfBlock;
  const Int mask = set_int((1 << bits) - 1);
  const int64_t N = weight.N;
  for (int i = 0; i < rows; i += kStrip) {
    const int part = i / kStrip % kStripsOfBlock.kCount;
    const StripOfRows<bits>& strip = kStripsOfBlock.strips[part];
    const Int shift = load_int(strip.shifts);
    const uint32_t* block = words_of(weight, row + i, column);
    const uint32_t* source = block + strip.first_word * N;
    for (int n = 0; n < columns; ++n) {
      Int value = set_int(static_cast<int32_t>(source[n]));
      for (int w = 1; w < strip.words; ++w) {
        value = join(value, set_int(static_cast<int32_t>(source[w * N + n])), strip.first_lane[w]);
      }
      value = bit_and(shift_right(value, shift), mask);
      if (kSliced > 0 && part == kStripsOfBlock.kCount - 1) {
#pragma GCC unroll 2
        for (int s = 0; s < kSliced; ++s) {
          constexpr const layout::Place* kPlaces = layout::kFormat<bits>.shuffled + kValues - kSliced;
          uint32_t whole = 0;
#pragma GCC unroll 3
          for (int f = 0; f < kPlaces[s].count; ++f) {
            whole |= kPlaces[s].fields[f].get(block[kPlaces[s].fields[f].word * N + n]);
          }
          value = join(value, set_int(static_cast<int32_t>(whole)), kStrip - kSliced + s);
        }
      }
      const Int centered = sub_int32(value, set_int(zeros[n]));
      store_floats(panel + n * kPanelColumns + i, multiply(to_float(centered), set_float(scales[n])));
    }
  }
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

}  // namespace
}  // namespace exllama::cpu
