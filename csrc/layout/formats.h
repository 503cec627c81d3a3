// The bit formats, the constexpr twin of exllama_ops/layout/formats.py. docs/format.md draws them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EXLLAMA_HOST_DEVICE __host__ __device__
#else
#define EXLLAMA_HOST_DEVICE
#endif

namespace exllama::layout {

// A run of bits of one value that lie together in one word.
struct Field {
  int low_bit;  // the value's bits from low_bit up
  int width;
  int word;   // lie in this word of the block
  int shift;  // from this bit up

  // What the word holds of the value, and what a word holds of `value` here and nowhere else.
  EXLLAMA_HOST_DEVICE constexpr uint32_t get(uint32_t bits_of_word) const {
    return (bits_of_word >> shift & mask()) << low_bit;
  }
  EXLLAMA_HOST_DEVICE constexpr uint32_t put(uint32_t value) const { return (value >> low_bit & mask()) << shift; }

 private:
  EXLLAMA_HOST_DEVICE constexpr uint32_t mask() const { return (1u << width) - 1; }
};

// Where the bits of one value lie: in one field, or in up to three for the values of 3 bits that cross words.
struct Place {
  int count;
  Field fields[3];

  // The value, whose block begins at `words` with its words `stride` apart.
  EXLLAMA_HOST_DEVICE constexpr uint32_t read(const uint32_t* words, int64_t stride) const {
    uint32_t value = 0;
    for (int i = 0; i < count; ++i) value |= fields[i].get(words[fields[i].word * stride]);
    return value;
  }
};

struct Format {
  int bits;
  int block_values;  // the smallest run of values that fills whole words
  int block_words;
  Place checkpoint[32];
  Place shuffled[32];

  constexpr const Place& place_of(int64_t value, bool in_shuffled_order) const {
    const Place* places = in_shuffled_order ? shuffled : checkpoint;
    return places[value];
  }
};

// The least common multiple of a value's bits and a word's, counted in values and in words. Right for every width.
EXLLAMA_HOST_DEVICE constexpr int block_values(int bits) { return 32 / (bits & -bits); }
EXLLAMA_HOST_DEVICE constexpr int block_words(int bits) { return bits / (bits & -bits); }

// The bit of the block's stream at which bit b of value j lies, in checkpoint order.
EXLLAMA_HOST_DEVICE constexpr int checkpoint_position(int bits, int j, int b) { return bits * j + b; }

// In shuffled order: values 2 i and 2 i + 1 lie 16 bits apart. 8 bits are not moved. A word of 3 bits has ten whole
// values. The values 30 and 31 are sliced over the bits 15 and 31 of the three words. The position is negative for a
// width that has no shuffled order yet: the static_assert below kWidths refuses it.
EXLLAMA_HOST_DEVICE constexpr int shuffled_position(int bits, int j, int b) {
  if (bits == 8) return 8 * j + b;
  if (bits == 2 || bits == 4) return bits * (j / 2) + 16 * (j % 2) + b;
  if (bits == 3) return j < 30 ? 32 * (j / 10) + 3 * ((j % 10) / 2) + 16 * (j % 2) + b : 32 * b + (j == 30 ? 15 : 31);
  return -1;
}

EXLLAMA_HOST_DEVICE constexpr int position(int bits, int j, int b, bool shuffled) {
  return shuffled ? shuffled_position(bits, j, b) : checkpoint_position(bits, j, b);
}

EXLLAMA_HOST_DEVICE constexpr Place place(int bits, int j, bool shuffled) {
  Place result{};
  for (int b = 0; b < bits; ++b) {
    const int word = position(bits, j, b, shuffled) / 32, shift = position(bits, j, b, shuffled) % 32;
    const int last = result.count - 1;
    if (b > 0 && result.fields[last].word == word && result.fields[last].shift + result.fields[last].width == shift) {
      ++result.fields[last].width;
    } else {
      result.fields[result.count++] = Field{b, 1, word, shift};
    }
  }
  return result;
}

constexpr Format make_format(int bits) {
  Format format{};
  format.bits = bits;
  format.block_values = block_values(bits);
  format.block_words = block_words(bits);
  for (int j = 0; j < format.block_values; ++j) {
    format.checkpoint[j] = place(bits, j, false);
    format.shuffled[j] = place(bits, j, true);
  }
  return format;
}

template <int bits>
inline constexpr Format kFormat = make_format(bits);

// Every bit width. What is made for one width at compile time is reached through with_bits in dispatch.h.
inline constexpr int kWidths[] = {2, 3, 4, 8};

constexpr bool all_widths_have_a_shuffled_order() {
  for (const int bits : kWidths) {
    if (shuffled_position(bits, 0, 0) < 0) return false;
  }
  return true;
}
static_assert(all_widths_have_a_shuffled_order(),
              "csrc/layout has no shuffled order of a width in kWidths: add it to shuffled_position in formats.h");

}  // namespace exllama::layout
