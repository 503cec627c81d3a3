// gemm on the tensor cores straight from the shuffled words, for x of 16 bits; fragments by the tables of the PTX ISA.
//
// W^T is the A operand of mma.m16n8k16 and x^T the B operand, so that eight tokens fill a tile. Lane 4 g + t of a warp
// has the columns 4 g to 4 g + 3 of 32: the columns 0 and 1 of them are rows g and g + 8 of one fragment, 2 and 3 of a
// second one. The order of k inside an mma is free as long as A and B agree: lane t has 8 consecutive k where the PTX
// table has the pairs 2 t and 2 t + 8, so that a lane's k lie in one word and x is read in 16 bytes.
//
// The integers q - z are exact in float16 and bfloat16 (|q - z| <= 256). They are what is multiplied: the scale comes at
// the end of a group, in float32, and an outlier of x costs nothing where q = z.
#pragma once

#include "tiles.h"
#include "words.cuh"

namespace exllama::cuda {

template <int bits>
struct MmaStep {
  static constexpr int kK = mma_step_k(bits);
  static constexpr int kLaneK = kK / 4;
  static constexpr int kWords = kLaneK * bits / 32;  // of a lane and a column
  static constexpr int kChunks = kLaneK / 8;         // 16 bytes of x
  static constexpr int kPerRun = kMmaRunK / kK;
};

struct MmaShape {
  int64_t runs_per_split;
  // ceil(2**32 / (2 * steps in a group)): see divide_steps.
  uint32_t group_reciprocal;
  bool groups_fill_runs;  // no group ends inside a run
};

// step / steps_per_group by a multiplication: exact while step * steps_per_group < 2**30 (Granlund and Montgomery 1994).
__device__ inline uint32_t divide_steps(uint32_t step, uint32_t reciprocal) {
  return __umulhi(2 * step + 1, reciprocal);
}

// d += a * b. On sm_75 the m16n8k16 is two m16n8k8, whose fragments are its halves.
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high);

template <>
__device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
#elif __CUDA_ARCH__ >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b_low));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b_high));
#else
  __trap();  // select_gemm knows the archs
#endif
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
#else
  __trap();  // select_gemm knows the archs
#endif
}

// q & bits of `fields` with the exponent under which they are an integer plus 2**10 (float16) or 2**7 (bfloat16): one
// LOP3 from (w & fields) | magic, which the compiler makes two of.
__device__ inline uint32_t and_or(uint32_t w, uint32_t fields, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(w), "r"(fields), "r"(magic));
  return result;
}

// a * factor + b, element by element, in one rounding.
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
  uint32_t result = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(factor), "r"(b));
#else
  __trap();  // select_gemm knows the archs
#endif
  return result;
}

template <typename T>
struct Format16;
template <>
struct Format16<__half> {
  static constexpr int kMantissa = 10, kBias = 15;
};
template <>
struct Format16<__nv_bfloat16> {
  static constexpr int kMantissa = 7, kBias = 127;
};

// How the pairs (2 i, 2 i + 1) of a lane's words become q - z, in the two halves of a register.
//
// With the exponent of 2**mantissa above them, the fields of a pair at bit 0 are 2**mantissa + q, and at bit s they are
// 2**mantissa + q * 2**s. So one multiply-add by 2**-s, with -(2**(mantissa - s) + z), gives the exact q - z of several
// pairs without a shift: of all that fit into the mantissa.
template <int bits, typename T>
struct Pairs {
  static constexpr int kMantissa = Format16<T>::kMantissa;
  static constexpr bool kWide = bits > kMantissa;  // q does not fit into the mantissa: 8 bits in bfloat16
  static constexpr int kInWord = bits == 3 ? 5 : 16 / bits;
  // Pairs of a word that are taken without a shift between them.
  static constexpr int kPlaces = bits == 8 ? 1 : bits == 2 ? kMantissa / 4 * 2 : kMantissa / bits;

  // What `get` takes for a zero point.
  struct Zero {
    uint32_t negative[kPlaces];

    __device__ void set(uint32_t z) {
      if constexpr (kWide) {
        negative[0] = 0xCB000000u + z;  // -(2**23 + z) in float32
      } else {
#pragma unroll
        for (int place = 0; place < kPlaces; ++place) {
          // The last place of 2**(mantissa - s) is 2**-s, and z is small enough not to change its exponent.
          const int s = bits * place;
          const uint32_t power = (Format16<T>::kBias + kMantissa - s) << kMantissa;
          negative[place] = (power + (z << s)) * 0x00010001u | 0x80008000u;
        }
      }
    }
  };

  static __device__ uint32_t get(const uint32_t* words, int i, const Zero& zero) {
    constexpr uint32_t kMagic = static_cast<uint32_t>(Format16<T>::kBias + kMantissa) << kMantissa;
    constexpr uint32_t kMagicPair = kMagic * 0x00010001u, kOne = (Format16<T>::kBias << kMantissa) * 0x00010001u;
    if constexpr (kWide) {
      // In float32, where 2**23 + q is exact; the upper half of the exact difference is its bfloat16.
      const uint32_t word = words[i / 2];
      const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, i % 2 ? 0x7442 : 0x7440));
      const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, i % 2 ? 0x7443 : 0x7441));
      const float z = __uint_as_float(zero.negative[0]);
      return __byte_perm(__float_as_uint(low + z), __float_as_uint(high + z), 0x7632);
    } else if constexpr (bits == 8) {
      const uint32_t pair = __byte_perm(words[i / 2], kMagicPair, i % 2 ? 0x5352 : 0x5150);
      return fma_pair<T>(pair, kOne, zero.negative[0]);
    } else {
      if (bits == 3 && i == 15) {
        uint32_t pair = and_or(words[0] >> 15, 0x00010001u, kMagicPair);
        pair = and_or(words[1] >> 14, 0x00020002u, pair);
        pair = and_or(words[2] >> 13, 0x00040004u, pair);
        return fma_pair<T>(pair, kOne, zero.negative[0]);
      }
      const int in_word = i % kInWord, place = in_word % kPlaces, s = bits * place;
      const uint32_t fields = (((1u << bits) - 1) << s) * 0x00010001u;
      const uint32_t pair = and_or(words[i / kInWord] >> (bits * (in_word - place)), fields, kMagicPair);
      const uint32_t factor = static_cast<uint32_t>((Format16<T>::kBias - s) << kMantissa) * 0x00010001u;
      return fma_pair<T>(pair, factor, zero.negative[place]);
    }
  }
};

// The scales and zero points of a lane's four columns as they lie in memory, loaded ahead of their use.
template <int bits>
struct MmaGroup {
  uint4 scales;  // of 16 bits: .x and .y
  uint32_t zeros[bits == 3 ? 2 : 1];

  __device__ void load(const Weight& weight, int64_t group, int64_t column) {
    const int64_t first = group * weight.N + column;
    if (weight.scales_dtype == DType::kFloat32) {
      scales = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(weight.scales) + first));
    } else {
      const uint2 halves = __ldg(reinterpret_cast<const uint2*>(static_cast<const __half*>(weight.scales) + first));
      scales.x = halves.x;
      scales.y = halves.y;
    }
    const uint32_t* row = weight.qzeros + group * (weight.N * bits / 32);
    const int64_t bit = column * bits;
    zeros[0] = __ldg(row + bit / 32);
    // Only the last of 12 bits may lie in the next word, which need not be there otherwise.
    if constexpr (bits == 3) zeros[1] = bit % 32 > 20 ? __ldg(row + bit / 32 + 1) : 0;
  }

  __device__ uint32_t zero(const Weight& weight, int64_t column, int c) const {
    const int shift = static_cast<int>(column) * bits % 32 + bits * c;
    uint32_t field;
    if constexpr (bits == 3) {
      field = static_cast<uint32_t>((static_cast<uint64_t>(zeros[1]) << 32 | zeros[0]) >> shift);
    } else {
      field = zeros[0] >> shift;
    }
    return (field & ((1u << bits) - 1)) + (weight.zeros_v2 ? 0 : 1);
  }

  __device__ float scale(const Weight& weight, int c) const {
    const uint32_t words[4] = {scales.x, scales.y, scales.z, scales.w};
    if (weight.scales_dtype == DType::kFloat32) return __uint_as_float(words[c]);
    const uint32_t half = words[c / 2] >> (16 * (c % 2)) & 0xFFFF;
    if (weight.scales_dtype == DType::kBFloat16) return __uint_as_float(half << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  }
};

// partials (split_k, M, N) if there are several splits, else out (M, N). tiles: of eight tokens, in a thread block.
template <int bits, typename T, int tiles>
__global__ void __launch_bounds__(kMmaThreads)
    gemm_mma(Weight weight, const T* x, int64_t M, MmaShape shape, float* partials, T* out) {
  using Step = MmaStep<bits>;
  constexpr int kTokens = kMmaTokens * tiles, kStageK = mma_stage_k(tiles);
  // Rows of x are 64 bytes apart modulo 128: the 16-byte reads of two tokens by four lanes meet every bank once.
  constexpr int kPitch = kStageK + 32;
  constexpr int kSums = 8 * tiles;  // of a lane
  __shared__ __align__(16) uint4 s_memory[kTokens * kPitch * 2 / 16];
  static_assert((kMmaWarpsK - 1) * kMmaWarpsN * 32 * kSums * 4 <= sizeof s_memory, "the sums fit where x was");
  T* const s_x = reinterpret_cast<T*>(s_memory);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_n = warp % kMmaWarpsN, warp_k = warp / kMmaWarpsN;
  const int64_t K = weight.K, N = weight.N;
  const int64_t column_tiles = (N + kMmaColumns - 1) / kMmaColumns;
  const int64_t column = (blockIdx.x % column_tiles * kMmaWarpsN + warp_n) * 32 + 4 * g;
  const int64_t first_token = blockIdx.x / column_tiles * kTokens;
  const bool active = column < N;  // N is a multiple of 4

  const auto runs = static_cast<int32_t>((K + kMmaRunK - 1) / kMmaRunK);
  const auto first_run = static_cast<int32_t>(blockIdx.y * shape.runs_per_split);
  const auto end_run = static_cast<int32_t>(min(first_run + shape.runs_per_split, static_cast<int64_t>(runs)));
  const auto word_rows = static_cast<int32_t>(K * bits / 32);

  struct Run {
    uint32_t words[Step::kPerRun][4][Step::kWords];
    MmaGroup<bits> group;
  };
  // What lies beyond N or K is read from the last column or row: such a column is not written, and x is 0 in such a row.
  const uint32_t* const lane_words = weight.qweight + min(column, N - 4);
  const auto load_run = [&](Run& run, int32_t number) {
    if (number >= end_run) return;
    const int32_t first_row = number * (kMmaRunK * bits / 32) + t * Step::kWords;
    const bool whole = static_cast<int64_t>(number + 1) * kMmaRunK <= K;
    const uint32_t* const words = lane_words + first_row * N;
#pragma unroll
    for (int s = 0; s < Step::kPerRun; ++s) {
#pragma unroll
      for (int w = 0; w < Step::kWords; ++w) {
        const int row = s * 4 * Step::kWords + w;
        const uint32_t* const from = whole ? words + row * N : lane_words + min(first_row + row, word_rows - 1) * N;
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(from));
        run.words[s][0][w] = four.x;
        run.words[s][1][w] = four.y;
        run.words[s][2][w] = four.z;
        run.words[s][3][w] = four.w;
      }
    }
    run.group.load(weight, divide_steps(number * Step::kPerRun, shape.group_reciprocal), min(column, N - 4));
  };

  float total[tiles][2][4] = {}, group_sum[tiles][2][4] = {};
  float scale[4] = {};
  typename Pairs<bits, T>::Zero zero[4] = {};
  uint32_t group = ~0u;
  const auto end_group = [&] {
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& sum = group_sum[tile][i / 4][i % 4];
        total[tile][i / 4][i % 4] = fmaf(sum, scale[i / 2], total[tile][i / 4][i % 4]);
        sum = 0;
      }
    }
  };

  Run next;
  load_run(next, first_run + warp_k);
  int32_t number = first_run + warp_k;
  for (int32_t stage_run = first_run; stage_run < end_run; stage_run += kStageK / kMmaRunK) {
    __syncthreads();  // the last stage has been read
    // x in shared memory: [token][step][chunk], 16-byte chunks in the order in which the four lanes read them together.
    for (int i = threadIdx.x; i < kTokens * (kStageK / 8); i += kMmaThreads) {
      const int chunk = i % (kStageK / 8);
      const int64_t token = first_token + i / (kStageK / 8);
      const int64_t k = static_cast<int64_t>(stage_run) * kMmaRunK + 8 * chunk;
      constexpr int kInStep = 4 * Step::kChunks;
      const int in_step = chunk % kInStep;
      const int place = chunk - in_step + in_step % Step::kChunks * 4 + in_step / Step::kChunks;
      T* const to = s_x + i / (kStageK / 8) * kPitch + 8 * place;
      const bool straight = !weight.rows && K % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
      if (token >= M || k >= K) {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      } else if (straight) {
        *reinterpret_cast<uint4*>(to) = __ldg(reinterpret_cast<const uint4*>(x + token * K + k));
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = k + e < K ? x[token * K + source_row(weight, k + e)] : rounded<T>(0.0f);
      }
    }
    __syncthreads();
    for (; number < min(stage_run + kStageK / kMmaRunK, end_run); number += kMmaWarpsK) {
      const Run run = next;
      load_run(next, number + kMmaWarpsK);
#pragma unroll
      for (int s = 0; s < Step::kPerRun; ++s) {
        const uint32_t step = number * Step::kPerRun + s;
        if (s == 0 || !shape.groups_fill_runs) {
          if (static_cast<int64_t>(step) * Step::kK >= K) break;
          const uint32_t step_group = divide_steps(step, shape.group_reciprocal);
          if (step_group != group) {
            end_group();
            group = step_group;
            MmaGroup<bits> loaded = run.group;
            if (s > 0) loaded.load(weight, group, min(column, N - 4));
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              scale[c] = loaded.scale(weight, c);
              zero[c].set(loaded.zero(weight, min(column, N - 4), c));
            }
          }
        }
        const int in_stage = (number - stage_run) * Step::kPerRun + s;
#pragma unroll
        for (int chunk = 0; chunk < Step::kChunks; ++chunk) {
          uint4 b[tiles];
#pragma unroll
          for (int tile = 0; tile < tiles; ++tile) {
            b[tile] = *reinterpret_cast<const uint4*>(s_x + (8 * tile + g) * kPitch + in_stage * Step::kK +
                                                      8 * (4 * chunk + t));
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int columns = 0; columns < 2; ++columns) {
              const uint32_t* words = run.words[s][2 * columns];
              const uint32_t* others = run.words[s][2 * columns + 1];
              const int pair = 4 * chunk + 2 * half;
              using Pair = Pairs<bits, T>;
              const uint32_t a[4] = {Pair::get(words, pair, zero[2 * columns]),
                                     Pair::get(others, pair, zero[2 * columns + 1]),
                                     Pair::get(words, pair + 1, zero[2 * columns]),
                                     Pair::get(others, pair + 1, zero[2 * columns + 1])};
#pragma unroll
              for (int tile = 0; tile < tiles; ++tile) {
                mma<T>(group_sum[tile][columns], a, half ? b[tile].z : b[tile].x, half ? b[tile].w : b[tile].y);
              }
            }
          }
        }
      }
    }
  }
  end_group();

  // The warps along K are added from the first to the last.
  __syncthreads();  // the last stage has been read
  float* const s_sums = reinterpret_cast<float*>(s_memory);
  const auto sum_of = [&](int k_warp, int i) -> float& {
    return s_sums[(((k_warp - 1) * kMmaWarpsN + warp_n) * kSums + i) * 32 + lane];
  };
  if (warp_k > 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum_of(warp_k, i) = total[i / 8][i / 4 % 2][i % 4];
  }
  __syncthreads();
  if (warp_k > 0 || !active) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    float sum = total[i / 8][i / 4 % 2][i % 4];
#pragma unroll
    for (int k_warp = 1; k_warp < kMmaWarpsK; ++k_warp) sum += sum_of(k_warp, i);
    // Accumulator i of a tile: column 2 (i / 4) + i % 4 / 2 of the lane's, token 2 t + i % 2 of the tile.
    const int64_t token = first_token + i / 8 * 8 + 2 * t + i % 2;
    const int64_t n = column + i / 4 % 2 * 2 + i % 4 / 2;
    if (token >= M) continue;
    if (partials) {
      partials[(blockIdx.y * M + token) * N + n] = sum;
    } else {
      out[token * N + n] = rounded<T>(sum);
    }
  }
}

}  // namespace exllama::cuda
