// The operands of the tensor cores: fragments of q - z, which are made of the words in registers.
//
// W^T is the A operand of mma.m16n8k16 and x^T the B operand, so that an octet of tokens fills it. Lane 4 g + t of a
// warp has the columns 4 g to 4 g + 3 of 32. Columns 0 and 1 of these are the rows g and g + 8 of one fragment, by the
// tables of the PTX ISA. Columns 2 and 3 are those of a second one.
//
// The order of k inside an mma is free as long as A and B agree. Where the PTX table has the pairs 2 t and 2 t + 8 of
// k, lane t has any two pairs of its words. x lies in shared memory in the order that follows from it.
//
// The integers q - z are exact in float16 and bfloat16, since |q - z| <= 256. They are what is multiplied: the scale
// comes later, in float32, and an outlier of x costs nothing where q = z.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

// kMmaArch: the first architecture whose tensor cores have `mma` below.
template <typename T>
struct Format16;
template <>
struct Format16<__half> {
  static constexpr int kMantissa = 10, kBias = 15, kMmaArch = 750;
};
template <>
struct Format16<__nv_bfloat16> {
  static constexpr int kMantissa = 7, kBias = 127, kMmaArch = 800;
};

// Whether the device code that is being compiled can have `mma`.
template <typename T>
__device__ constexpr bool has_mma() {
#ifdef __CUDA_ARCH__
  return __CUDA_ARCH__ >= Format16<T>::kMmaArch;
#else
  return false;
#endif
}

// Adds a * b to d. On sm_75 the m16n8k16 is two m16n8k8, whose fragments are its halves.
//
// All lanes of a warp must be here together. `volatile` is what tells a compiler: without it LLVM may move the asm under
// a test of the lane that only its result needs.
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high);

template <>
__device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b_low));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b_high));
#endif
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Computes a * factor + b in both halves of a register, each in one rounding.
template <typename T>
__device__ inline uint32_t fma_pair(uint32_t a, uint32_t factor, uint32_t b);
template <>
__device__ inline uint32_t fma_pair<__half>(uint32_t a, uint32_t factor, uint32_t b) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(factor), "r"(b));
  return result;
}
template <>
__device__ inline uint32_t fma_pair<__nv_bfloat16>(uint32_t a, uint32_t factor, uint32_t b) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(factor), "r"(b));
  return result;
}

// How a pair of values, 16 bits apart in a word, becomes q - z in the two halves of a register.
//
// With the exponent of 2**mantissa above them, the fields of a pair at bit 0 are 2**mantissa + q. At bit s they are
// 2**mantissa + q * 2**s. So one multiply-add by 2**-s, with -(2**(mantissa - s) + z), gives the exact q - z without a
// shift. This serves every pair whose fields lie within the mantissa.
template <int bits, typename T>
struct Pairs {
  static constexpr int kMantissa = Format16<T>::kMantissa;
  static constexpr uint32_t kMagic = static_cast<uint32_t>(Format16<T>::kBias + kMantissa) << kMantissa;
  static constexpr uint32_t kMagicPair = kMagic * 0x00010001u;
  static constexpr uint32_t kFields = ((1u << bits) - 1) * 0x00010001u;
  static constexpr bool kWide = bits > kMantissa;  // q does not fit into the mantissa: 8 bits in bfloat16
  static constexpr int kInWord = bits == 3 ? 5 : 16 / bits;
  static_assert(32 % bits == 0 || bits == 3,
                "csrc/cuda unpacks no pairs of this bit width: add them to MmaLane in mma_operands.cuh");
  // Pairs of a word between two shifts, each of which has its own zero point: as few as the fewest shifts allow.
  static constexpr int kShifts = bits == 8 ? kInWord : (kInWord - 1) / (kMantissa / bits) + 1;
  static constexpr int kPlaces = (kInWord - 1) / kShifts + 1;

  static __device__ constexpr uint32_t power_of_two(int exponent) {
    return (static_cast<uint32_t>(Format16<T>::kBias + exponent) << kMantissa) * 0x00010001u;
  }

  // A zero point as it lies in shared memory: -(2**mantissa + z) in both halves, or -(2**23 + z) in float32. That of
  // z + 1 is kNextZero more.
  static constexpr uint32_t kNextZero = kWide ? 1 : 0x00010001u;
  static __device__ uint32_t negative_zero(uint32_t z) {
    return (kWide ? 0xCB000000u : 0x80008000u + kMagicPair) + z * kNextZero;
  }

  // A zero point as it is added at place p, where s is bits * p: -(2**(mantissa - s) + z).
  struct Zero {
    uint32_t negative[kPlaces];

    __device__ void set(uint32_t negative_zero) {
      negative[0] = negative_zero;
#pragma unroll
      for (int place = 1; place < kPlaces; ++place) {
        // 2**mantissa - 2**(mantissa - s) has s leading ones, the first of them implicit.
        const uint32_t difference = kMagicPair - (2u << (kMantissa - bits * place)) * 0x00010001u;
        negative[place] = fma_pair<T>(negative_zero, power_of_two(0), difference);
      }
    }
  };

  // The pair whose fields lie at bit `bits * place`.
  static __device__ uint32_t at_place(uint32_t word, int place, const Zero& zero) {
    const int s = bits * place;
    return fma_pair<T>(and_or(word, kFields << s, kMagicPair), power_of_two(-s), zero.negative[place]);
  }

  // The pair of 8 bits in the bytes 2 i and 2 i + 1.
  static __device__ uint32_t of_bytes(uint32_t word, int i, const Zero& zero) {
    if constexpr (kWide) {
      // In float32 2**23 + q is exact. The upper half of the exact difference is its bfloat16.
      const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, i ? 0x7442 : 0x7440));
      const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, i ? 0x7443 : 0x7441));
      const float z = __uint_as_float(zero.negative[0]);
      return __byte_perm(__float_as_uint(low + z), __float_as_uint(high + z), 0x7632);
    } else {
      return fma_pair<T>(__byte_perm(word, kMagicPair, i ? 0x5352 : 0x5150), power_of_two(0), zero.negative[0]);
    }
  }

  // The pair of 3 bits whose bits b are those of word b that `masks` leaves after a shift.
  static __device__ uint32_t of_three_words(const uint32_t (&words)[3], const uint32_t (&shifts)[3],
                                            const uint32_t (&masks)[3], const Zero& zero) {
    uint32_t pair = kMagicPair;
#pragma unroll
    for (int w = 0; w < 3; ++w) pair = and_or(words[w] >> shifts[w], masks[w], pair);
    return fma_pair<T>(pair, power_of_two(0), zero.negative[0]);
  }
};

// What lane t of four has of a step of `step_k` rows. In each column it has the words from `first_word` on, whose pairs
// are pair(words, 0) to pair(words, step_k / 8 - 1). Four pairs are a chunk. Chunk c of the step has the rows
// k_of(c, 0) to k_of(c, 7), and lane t has the chunks t, t + 4 and so on.
template <int bits, typename T, int step_k>
struct MmaLane {
  using P = Pairs<bits, T>;
  static constexpr int kChunks = step_k / 32;  // of a lane
  static constexpr int kWords = kChunks * bits / 4;
  static constexpr bool kInOrder = true;  // the rows of a chunk follow each other
  int first_word;

  __device__ explicit MmaLane(int t) : first_word(kWords * t) {}

  __device__ uint32_t pair(const uint32_t (&words)[kWords], int i, const typename P::Zero& zero) const {
    if constexpr (bits == 8) {
      return P::of_bytes(words[i / 2], i % 2, zero);
    } else {
      if constexpr (bits == 3) {
        constexpr uint32_t kShifts[3] = {15, 14, 13}, kMasks[3] = {0x00010001, 0x00020002, 0x00040004};
        if (i == 15) return P::of_three_words(words, kShifts, kMasks, zero);
      }
      const int in_word = i % P::kInWord, place = in_word % P::kPlaces;
      return P::at_place(words[i / P::kInWord] >> (bits * (in_word - place)), place, zero);
    }
  }

  static __device__ int k_of(int chunk, int e) { return 8 * (chunk % 4 * kChunks + chunk / 4) + e; }
};

// 2 bits in a step of 32 rows: two lanes share a word of sixteen values. One has the lower half of each half of the
// word, and one the upper.
template <typename T>
struct MmaLane<2, T, 32> {
  using P = Pairs<2, T>;
  static constexpr int kChunks = 1, kWords = 1;
  static constexpr bool kInOrder = true;
  int first_word, shift;

  __device__ explicit MmaLane(int t) : first_word(t / 2), shift(t % 2 * 8) {}

  __device__ uint32_t pair(const uint32_t (&words)[1], int i, const typename P::Zero& zero) const {
    const int place = i % P::kPlaces;
    return P::at_place(words[0] >> shift >> (2 * (i - place)), place, zero);
  }

  static __device__ int k_of(int chunk, int e) { return 8 * chunk + e; }
};

// 3 bits in a step of 32 rows: four lanes share a block of three words. Pair t of each word is lane t's. Two kinds of
// pairs are left: pair 4 of word t is lane t's too, and the pair that is sliced over the words is lane 3's.
template <typename T>
struct MmaLane<3, T, 32> {
  using P = Pairs<3, T>;
  static constexpr int kChunks = 1, kWords = 3;
  static constexpr bool kInOrder = false;
  static constexpr int first_word = 0;
  int shift;
  uint32_t last_shifts[3], last_masks[3];

  __device__ explicit MmaLane(int t) : shift(3 * t) {
#pragma unroll
    for (int w = 0; w < 3; ++w) {
      last_shifts[w] = t == 3 ? 15 - w : 12;
      last_masks[w] = t == 3 ? 0x00010001u << w : t == w ? P::kFields : 0;
    }
  }

  __device__ uint32_t pair(const uint32_t (&words)[3], int i, const typename P::Zero& zero) const {
    return i < 3 ? P::at_place(words[i] >> shift, 0, zero) : P::of_three_words(words, last_shifts, last_masks, zero);
  }

  static __device__ int k_of(int chunk, int e) {
    const int i = e / 2, first = i < 3 ? 10 * i + 2 * chunk : chunk < 3 ? 10 * chunk + 8 : 30;
    return first + e % 2;
  }
};

}  // namespace exllama::cuda
