// The values in the words: where csrc/layout/formats.h says they lie.
#pragma once

#include "../layout/formats.h"
#include "numbers.cuh"
#include "overlap.cuh"

namespace exllama::cuda {

// Value j of a block of words. If j is known at compile time, little is left of this.
template <int bits, bool shuffled>
__device__ inline uint32_t value_of(const uint32_t* words, int j) {
  using layout::position;
  if constexpr (bits == 3) {
    // One of three words is chosen, not indexed: a run-time index would put them into local memory.
    const auto word = [&](int at) { return at < 32 ? words[0] : at < 64 ? words[1] : words[2]; };
    const int first = position(3, j, 0, shuffled), last = position(3, j, 2, shuffled);
    if (last == first + 2 && last / 32 == first / 32) return word(first) >> (first % 32) & 7;
    uint32_t value = 0;
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      const int at = position(3, j, b, shuffled);
      value |= (word(at) >> (at % 32) & 1) << b;
    }
    return value;
  } else {
    static_assert(layout::block_words(bits) == 1,
                  "csrc/cuda reads no values of this bit width: add them to value_of in words.cuh");
    return words[0] >> position(bits, j, 0, shuffled) & ((1u << bits) - 1);
  }
}

// (w & fields) | magic is one LOP3, of which the compiler makes two.
__device__ inline uint32_t and_or(uint32_t w, uint32_t fields, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(w), "r"(fields), "r"(magic));
  return result;
}

// Takes the bits of a where mask is set, and else those of b.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
}

// Makes q - z of the values of a block of words as floats: one instruction places the field, and one subtracts.
//
// The bits of a word from bit s on, with the exponent of 2**(23 - s) above them, are the float 2**(23 - s) + q. With z
// in the same place the difference of the two is exact: both are multiples of 2**-s below 2**24. Higher fields of a
// word are shifted down together. A value of 3 bits that lies in three words is brought to s = 0.
template <int bits, bool shuffled>
struct PlacedFields {
  static_assert(layout::block_words(bits) == 1 || bits == 3,
                "csrc/cuda places no fields of this bit width: add them to PlacedFields in words.cuh");
  // The low bits of a word, shifted or not, that are looked at. For 2 bits they are eight: 16 would have too many zero
  // points for the registers of gemm_scalar.
  static constexpr int kWindow = bits == 2 ? 8 : 16;
  // How many s there are: place i is bit bits * i.
  static constexpr int kPlaces = bits == 8 || (bits == 3 && !shuffled) ? 1 : kWindow / bits;

  float zero[kPlaces];  // 2**(23 - s) + z

  __device__ void set_zero(uint32_t z) {
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) zero[place] = __uint_as_float(exponent(place) + (z << bits * place));
  }

  // Value j, which is known at compile time, minus the zero point.
  __device__ float get(const uint32_t* words, int j) const {
    if constexpr (bits == 8) {
      // Above byte j of the word come the bytes of the exponent, which the zero point's float has as well.
      return __uint_as_float(__byte_perm(words[0], __float_as_uint(zero[0]), 0x7660 | j)) - zero[0];
    } else if constexpr (kPlaces == 1) {
      return __uint_as_float(value_of<bits, shuffled>(words, j) | exponent(0)) - zero[0];
    } else {
      const int first = layout::position(bits, j, 0, shuffled);
      const bool sliced = bits == 3 && j >= 30;
      const int place = sliced ? 0 : first % kWindow / bits;
      uint32_t word = words[first / 32];
      if (sliced) {
        // Bit b of the two values is bit 15 or 31 of word b.
        word = select_bits(0x00010001, words[0] >> 15, words[1] >> 14);
        word = select_bits(0x00030003, word, words[2] >> 13);
      }
      word >>= first % 32 / kWindow * kWindow;
      return __uint_as_float(and_or(word, ((1u << bits) - 1) << bits * place, exponent(place))) - zero[place];
    }
  }

 private:
  __device__ static constexpr uint32_t exponent(int place) {
    return static_cast<uint32_t>(127 + 23 - bits * place) << 23;
  }
};

// Puts value j into the words of a block, whose bits there are 0.
template <int bits, bool shuffled>
__device__ inline void insert_value(uint32_t* words, int j, uint32_t value) {
#pragma unroll
  for (int b = 0; b < bits; ++b) {
    const int at = layout::position(bits, j, b, shuffled);
    words[at / 32] |= (value >> b & 1) << (at % 32);
  }
}

// The value of a weight at (row, column).
template <int bits, bool shuffled>
__device__ inline uint32_t read_value(const uint32_t* qweight, int64_t N, int64_t row, int64_t column) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = qweight[(row / kValues * kWords + w) * N + column];
  return value_of<bits, shuffled>(words, static_cast<int>(row % kValues));
}

// The zero point of a group and a column, at most 256.
template <int bits>
__device__ inline uint32_t zero_of(const Weight& weight, int64_t group, int64_t column) {
  // A field lies in one word, or goes on in the next. Its first bit in the row of the group is bits * column.
  const uint32_t* row = weight.qzeros + group * (weight.N * bits / 32);
  const int64_t first = column * bits;
  uint32_t field = row[first / 32] >> (first % 32);
  if (32 % bits != 0 && first % 32 > 32 - bits) field |= row[first / 32 + 1] << (32 - first % 32);
  return (field & ((1u << bits) - 1)) + weight.zero_offset;
}

// The zero points of a group in four columns, the first of which is a multiple of four.
template <int bits>
struct FourZeros {
  uint32_t fields;

  // word(i): word i of the group's row, from a column on at which a word begins. column: counted from there, below 2**29.
  template <typename Word>
  __device__ FourZeros(const Word& word, uint32_t column) {
    const uint32_t first = column * bits, shift = first % 32;
    fields = word(first / 32) >> shift;
    // The fields may go on in the next word, which need not be there otherwise.
    if (32 % bits != 0 && shift > 32 - 4 * bits) fields |= word(first / 32 + 1) << (32 - shift);
  }
  // row: the same words in memory.
  __device__ FourZeros(const uint32_t* row, uint32_t column)
      : FourZeros([&](uint32_t i) { return load_global(row + i); }, column) {}
  __device__ FourZeros(const Weight& weight, int64_t group, int64_t column)
      : FourZeros(weight.qzeros + group * (weight.N * bits / 32) + column / 32 * bits, column % 32) {}

  __device__ uint32_t stored(int i) const { return fields >> (bits * i) & ((1u << bits) - 1); }
  __device__ uint32_t get(const Weight& weight, int i) const { return stored(i) + weight.zero_offset; }
};

__device__ inline float scale_of(const Weight& weight, int64_t group, int64_t column) {
  return load_number(weight.scales, weight.scales_dtype, group * weight.N + column);
}

// An index that came in a tensor, at which the host cannot look without a sync. A wrong one stops the kernel before it
// leads outside the memory of an argument, as it does in torch's own gathers.
__device__ inline int64_t checked_index(int32_t index, int64_t limit) {
  if (index < 0 || index >= limit) __trap();
  return index;
}

// The next `count` entries of an index, of which `there` exist; `missing` stands for the others. An entry may be as low
// as `lowest`. A check for each would be a branch that the next load waits for. So all are loaded first, and one
// comparison checks them: as unsigned numbers entries that are too low are above any limit.
template <int count, int32_t lowest = 0, int32_t missing = 0>
__device__ __forceinline__ void load_indices(const int32_t* index, int64_t there, int64_t limit,
                                             int32_t (&entries)[count]) {
  uint32_t largest = 0;
  const auto take = [&](int i, int32_t entry) {
    entries[i] = entry;
    largest = max(largest, static_cast<uint32_t>(entry) - static_cast<uint32_t>(lowest));
  };
  if (count % 4 == 0 && there >= count && reinterpret_cast<uintptr_t>(index) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const int4 four = load_global(reinterpret_cast<const int4*>(index + i));
      take(i, four.x);
      take(i + 1, four.y);
      take(i + 2, four.z);
      take(i + 3, four.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      entries[i] = missing;
      if (i < there) take(i, load_global(index + i));
    }
  }
  if (largest >= limit - lowest) __trap();
}

// The group of row k of the words, which is row k of the checkpoint unless the weight is shuffled.
__device__ inline int64_t group_of(const Weight& weight, int64_t k) {
  if (const int32_t* g_idx = weight.g_idx()) return checked_index(g_idx[k], weight.G);
  return k / weight.group_size;
}

// The row of the checkpoint that row k of the words is, and so its column of x.
__device__ inline int64_t permuted_row(const Weight& weight, int64_t k) {
  if (const int32_t* perm = weight.perm()) return checked_index(perm[k], weight.K);
  return k;
}

// The columns of x for the rows k_of(0) to k_of(count - 1) of W, which follow one another if in_order; -1 from K on.
template <bool in_order, int count, typename Int, typename F>
__device__ __forceinline__ void columns_of_x(const int32_t* perm, Int K, const F& k_of, Int (&x_columns)[count]) {
  if constexpr (in_order) {
    if (perm) return load_indices<count, 0, -1>(perm + k_of(0), K - k_of(0), K, x_columns);
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const Int k = k_of(i);
    x_columns[i] = k >= K ? -1 : k;
    if (perm && k < K) {
      x_columns[i] = load_global(perm + k);
      largest = max(largest, static_cast<uint32_t>(x_columns[i]));
    }
  }
  if (perm && static_cast<int64_t>(largest) >= K) __trap();
}

// Calls visit(j, scale * (q - z)) for the values of a block of words of one column, rounded to float32.
template <int bits, bool shuffled, typename Visit>
__device__ inline void visit_block(const Weight& weight, int64_t block, int64_t column, const Visit& visit) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = weight.qweight[(block * kWords + w) * weight.N + column];
  const bool by_row = weight.g_idx() != nullptr;
  const int64_t first = block * kValues;
  int64_t group = group_of(weight, first);
  // Where the next group begins, counted from the block's first row. With a g_idx it may begin at every row.
  auto next =
      static_cast<int>(by_row ? 1 : min((group + 1) * weight.group_size - first, static_cast<int64_t>(kValues)));
  float scale = scale_of(weight, group, column);
  auto zero = static_cast<int>(zero_of<bits>(weight, group, column));
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    if (j > 0 && j == next) {
      group = by_row ? group_of(weight, first + j) : group + 1;
      next = by_row ? j + 1 : static_cast<int>(min(j + weight.group_size, static_cast<int64_t>(kValues)));
      scale = scale_of(weight, group, column);
      zero = static_cast<int>(zero_of<bits>(weight, group, column));
    }
    visit(j, static_cast<float>(static_cast<int>(value_of<bits, shuffled>(words, j)) - zero) * scale);
  }
}

}  // namespace exllama::cuda
