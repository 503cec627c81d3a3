// dequantize: a thread has a block of words of eight columns, or of one where eight cannot be read and stored together.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kDequantizeThreads = 256;
inline constexpr int kDequantizeColumns = 8;  // whose 16 bits are stored together

// The part of W that is made, and where it goes: (rows, columns) once, or limb after limb (see limbs.h).
struct DenseW {
  int64_t first_row;  // of the words
  int64_t rows;
  int64_t first_column;
  int64_t columns;
  void* out;
  DType dtype;
  int limbs;
  float factor;  // 2**-shift
  float step;    // 2**step
};

// Stores neighbours from an index on.
template <int count, typename T>
__device__ __forceinline__ void store_neighbours(const T (&values)[count], T* to) {
  if constexpr (count * sizeof(T) % 16 == 0) {
    static_assert(alignof(T) <= 4);
    uint4 sixteen_bytes[count * sizeof(T) / 16];
    memcpy(sixteen_bytes, values, sizeof(values));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(values)) / 16; ++i) reinterpret_cast<uint4*>(to)[i] = sixteen_bytes[i];
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = values[i];
  }
}

template <int count, typename T>
__device__ __forceinline__ void store_rounded(const float (&values)[count], void* out, int64_t at) {
  T numbers[count];
#pragma unroll
  for (int i = 0; i < count; ++i) numbers[i] = rounded<T>(values[i]);
  store_neighbours(numbers, static_cast<T*>(out) + at);
}

// A first limb is 0 for a weight of 0 alone: where x is infinite, its product is that of the weight.
__device__ __forceinline__ __half first_limb(float value, __half) {
  const __half limb = rounded<__half>(value);
  const bool vanishes = value != 0 && to_float(limb) == 0;
  return vanishes ? __ushort_as_half(value < 0 ? 0x8001 : 0x0001) : limb;
}
__device__ __forceinline__ __nv_bfloat16 first_limb(float value, __nv_bfloat16) {
  return rounded<__nv_bfloat16>(value);
}

template <int count, typename T>
__device__ __forceinline__ void store_limbs(float (&values)[count], const DenseW& to, int64_t at) {
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] *= to.factor;
  for (int limb = 0;; at += to.rows * to.columns) {
    T numbers[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      numbers[i] = first_limb(values[i], T{});
      values[i] = (values[i] - to_float(numbers[i])) * to.step;
    }
    store_neighbours(numbers, static_cast<T*>(to.out) + at);
    if (++limb == to.limbs) return;
  }
}

// Stores `count` neighbours of a row.
template <bool limbs, int count>
__device__ __forceinline__ void store_values(float (&values)[count], const DenseW& to, int64_t row, int64_t column) {
  const int64_t at = row * to.columns + column;
  if constexpr (limbs) {
    if (to.dtype == DType::kFloat16) return store_limbs<count, __half>(values, to, at);
    return store_limbs<count, __nv_bfloat16>(values, to, at);
  } else {
    switch (to.dtype) {
      case DType::kFloat16:
        return store_rounded<count, __half>(values, to.out, at);
      case DType::kBFloat16:
        return store_rounded<count, __nv_bfloat16>(values, to.out, at);
      case DType::kFloat32:
        return store_rounded<count, float>(values, to.out, at);
    }
  }
}

// Calls store(j, row) for the rows of a block of words, which is the block-th of those that are made. With a
// permutation, they go to its rows.
template <int bits, bool limbs, typename F>
__device__ __forceinline__ void for_each_row(const Weight& weight, int64_t block, const F& store) {
  constexpr int kValues = layout::block_values(bits);
  const int32_t* perm = limbs ? nullptr : weight.perm();
  if (perm) {
    constexpr int kTogether = kValues < 8 ? kValues : 8;
#pragma unroll
    for (int first = 0; first < kValues; first += kTogether) {
      int32_t rows[kTogether];
      load_indices(perm + block * kValues + first, kTogether, weight.K, rows);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) store(first + j, static_cast<int64_t>(rows[j]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kValues; ++j) store(j, block * kValues + j);
  }
}

// W = scale * (q - z) is rounded once from float32, in which the product is exact for scales of 16 bits; or it is made of
// limbs, in the order of the words. Any row may begin a group.
template <int bits, bool shuffled, bool limbs>
__global__ void dequantize_columns(Weight weight, DenseW to) {
  constexpr int kValues = layout::block_values(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (thread >= to.rows / kValues * to.columns) return;
  const int64_t block = thread / to.columns, column = thread % to.columns;
  float values[kValues];
  visit_block<bits, shuffled>(weight, to.first_row / kValues + block, to.first_column + column,
                              [&](int j, float value) { values[j] = value; });
  for_each_row<bits, limbs>(weight, block, [&](int j, int64_t row) {
    float value[1] = {values[j]};
    store_values<limbs>(value, to, row, column);
  });
}

// The scales and zero points of a group in eight columns, and q - z times the scale.
template <int bits, bool shuffled>
struct EightColumns {
  static constexpr int kWords = layout::block_words(bits);
  static constexpr uint32_t kMagic = 0x4B000000u;  // with q in its last bits it is the float 2**23 + q

  uint32_t words[8][kWords];
  float scale[8], zero[8];

  __device__ __forceinline__ EightColumns(const Weight& weight, int64_t block, int64_t group, int64_t column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = column + 4 * half;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto* row = reinterpret_cast<const uint4*>(weight.qweight + (block * kWords + w) * weight.N + first);
        const uint4 four = __ldg(row);
        words[4 * half][w] = four.x;
        words[4 * half + 1][w] = four.y;
        words[4 * half + 2][w] = four.z;
        words[4 * half + 3][w] = four.w;
      }
      const float4 scales = load_four(weight.scales, weight.scales_dtype, group * weight.N + first);
      scale[4 * half] = scales.x;
      scale[4 * half + 1] = scales.y;
      scale[4 * half + 2] = scales.z;
      scale[4 * half + 3] = scales.w;
      const FourZeros<bits> zeros(weight, group, first);
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[4 * half + i] = __uint_as_float(kMagic + zeros.get(weight, i));
    }
  }

  __device__ __forceinline__ void get(int j, float (&values)[8]) const {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      uint32_t q;
      if constexpr (kWords == 1) {
        q = and_or(words[c][0] >> layout::position(bits, j, 0, shuffled), (1u << bits) - 1, kMagic);
      } else {
        q = value_of<bits, shuffled>(words[c], j) | kMagic;
      }
      values[c] = (__uint_as_float(q) - zero[c]) * scale[c];
    }
  }
};

// The same where a block of words lies in one group, and where eight columns can be loaded and stored together.
template <int bits, bool shuffled, bool limbs>
__global__ void dequantize_eights(Weight weight, DenseW to) {
  constexpr int kValues = layout::block_values(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  const int64_t eights = to.columns / kDequantizeColumns;
  if (thread >= to.rows / kValues * eights) return;
  const int64_t block = thread / eights, column = thread % eights * kDequantizeColumns;
  const int64_t of_words = to.first_row / kValues + block;
  const EightColumns<bits, shuffled> eight(weight, of_words, of_words * kValues / weight.group_size,
                                           to.first_column + column);
  for_each_row<bits, limbs>(weight, block, [&](int j, int64_t row) {
    float values[8];
    eight.get(j, values);
    store_values<limbs>(values, to, row, column);
  });
}

}  // namespace exllama::cuda
