// A stage of gemm_mma: what a thread block has in shared memory of x, of the scales and of the zero points.
#pragma once

#include "gather.h"
#include "mma_operands.cuh"
#include "mma_shape.h"
#include "overlap.cuh"
#include "words.cuh"

namespace exllama::cuda {

// How K is cut, as far as it is known at the launch alone.
struct MmaCut {
  int64_t runs_per_split;
  uint32_t group_reciprocal;  // ceil(2**32 / (2 * units in a group)): see group_of_unit
};

// unit / units_in_a_group by a multiplication. It is exact while the product of the two is below 2**30 (Granlund and
// Montgomery 1994).
__device__ inline uint32_t group_of_unit(uint32_t unit, uint32_t reciprocal) {
  return __umulhi(2 * unit + 1, reciprocal);
}

// The scales and zero points of one unit in four columns.
struct __align__(16) UnitGroup {
  float4 scales;
  uint4 negative_zeros;  // as Pairs has them
};

// Where a thread block finds its stages in global memory. It lies in shared memory itself, since the loop has no
// registers to spare. What the compiler would rather compute anew each time are 64-bit products.
struct __align__(16) StageSource {
  const char* x;    // the first token
  int64_t x_pitch;  // bytes between tokens
  const int32_t* perm;
  const char* zeros;  // of the first group and the first column
  const char* scales;
  uint32_t zeros_pitch, scales_pitch;  // bytes between groups
  uint32_t last_column;                // the last one at which four columns begin, counted from the first one on
  uint32_t negative_zero;              // of a stored 0, as Pairs has it
  int32_t tokens;
  int32_t in_order_k;  // rows of W whose chunks of x can be read at once: all or none
  int32_t row_bytes;   // between two rows of words
};

template <int bits, typename T>
__device__ StageSource stage_source(const Weight& weight, const T* x, int tokens, int32_t first_column) {
  const uint32_t N = static_cast<uint32_t>(weight.N), scale_bytes = weight.scales_dtype == DType::kFloat32 ? 4 : 2;
  StageSource source;
  source.x = reinterpret_cast<const char*>(x);
  source.x_pitch = weight.K * static_cast<int64_t>(sizeof(T));
  source.perm = weight.perm();
  source.zeros = reinterpret_cast<const char*>(weight.qzeros + static_cast<int64_t>(first_column) * bits / 32);
  source.scales = static_cast<const char*>(weight.scales) + static_cast<int64_t>(first_column) * scale_bytes;
  source.zeros_pitch = static_cast<uint32_t>(weight.N * bits / 8);
  source.scales_pitch = N * scale_bytes;
  source.last_column = N - 4 - first_column;
  source.negative_zero = Pairs<bits, T>::negative_zero(weight.zero_offset);
  source.tokens = tokens;
  const bool in_order = !weight.row_order && weight.K % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  source.in_order_k = in_order ? static_cast<int32_t>(weight.K) : 0;
  source.row_bytes = 4 * static_cast<int32_t>(weight.N);
  return source;
}

template <int bits, typename T, int octets, int unit_k>
struct Stage {
  using Lane = MmaLane<bits, T, mma_step_k(bits, unit_k)>;
  static constexpr int kK = mma_stage_k(unit_k, octets);
  static constexpr int kTokens = kOctet * octets;
  // Rows of x are 64 bytes apart modulo 128: the 16-byte reads of two tokens by four lanes meet every bank once.
  static constexpr int kPitch = kK + 32;
  static constexpr int kUnits = kK / unit_k;
  static constexpr int kFours = kMmaColumns / 4;
  // A thread has one chunk, and every kTogether-th token.
  static constexpr int kChunks = kK / 8, kTogether = kMmaThreads / kChunks;

  __align__(16) T x[kTokens][kPitch];  // [token][step][chunk]: MmaLane says which rows a chunk has
  UnitGroup groups[kUnits][kFours];

  // Lays the columns of x for the rows of W from first_k to end_k into x. Tokens that are not there keep what lies
  // there, or get another's numbers. A column of the product depends on no other column of x.
  __device__ __forceinline__ void load_x(const Weight& weight, const StageSource& source, int32_t first_k,
                                         int32_t end_k) {
    constexpr int kInStep = 4 * Lane::kChunks;
    const auto K = static_cast<int32_t>(weight.K);
    const int chunk = threadIdx.x % kChunks, first = kTogether == 1 ? 0 : threadIdx.x / kChunks;
    const int32_t step_k = first_k + (chunk - chunk % kInStep) * 8;
    if (step_k >= end_k) return;
    const auto k_of = [&](int e) { return step_k + Lane::k_of(chunk % kInStep, e); };
    const int tokens_left = source.tokens - first;
    const int64_t pitch = source.x_pitch * kTogether;
    const char* row = source.x + source.x_pitch * first;
    auto* to = reinterpret_cast<uint4*>(&x[first][8 * chunk]);
    if (Lane::kInOrder && k_of(0) < source.in_order_k) {
      copy_chunks(row + sizeof(T) * static_cast<uint32_t>(k_of(0)), pitch, to, tokens_left);
      return;
    }
    int32_t x_columns[8];
    static_assert(octets == 1 || kTokens > kMaxRowsThatLookUp);
    columns_of_x<Lane::kInOrder>(octets == 1 ? source.perm : nullptr, K, k_of, x_columns);
    gather_chunks(row, pitch, x_columns, to, tokens_left);
  }

  // Lays down the scales and zero points of the units from first_unit to end_unit: a thread has four columns of one.
  __device__ __forceinline__ void load_groups(const Weight& weight, const StageSource& source, const MmaCut& cut,
                                              uint32_t first_unit, uint32_t end_unit) {
    static_assert(kUnits * kFours <= kMmaThreads);
    static_assert(sizeof(groups) == kUnits * kFours * sizeof(UnitGroup));
    const uint32_t unit = threadIdx.x / kFours, four = threadIdx.x % kFours;
    if (first_unit + unit >= end_unit) return;
    const uint32_t column = min(4 * four, source.last_column);
    const uint32_t group = group_of_unit(first_unit + unit, cut.group_reciprocal);
    const char* const row_of_zeros = source.zeros + static_cast<uint64_t>(source.zeros_pitch) * group;
    const FourZeros<bits> zeros(reinterpret_cast<const uint32_t*>(row_of_zeros), column);
    const char* const scales = source.scales + static_cast<uint64_t>(source.scales_pitch) * group;
    const auto negative_zero = [&](int i) {
      return source.negative_zero + zeros.stored(i) * Pairs<bits, T>::kNextZero;
    };
    (&groups[0][0])[threadIdx.x] = {load_four(scales, weight.scales_dtype, column),
                                    make_uint4(negative_zero(0), negative_zero(1), negative_zero(2), negative_zero(3))};
  }

 private:
  static constexpr int kNext =
      kTogether * kPitch * sizeof(T) / sizeof(uint4);  // from a token's chunk to the next one's

  // Copies the thread's chunk of each token. Up to four loads are in flight.
  static __device__ __forceinline__ void copy_chunks(const char* row, int64_t pitch, uint4* to, int tokens_left) {
    constexpr int kTimes = kTokens / kTogether, kLoads = kTimes < 4 ? kTimes : 4;
    static_assert(kTimes % kLoads == 0);
#pragma unroll 1
    for (; tokens_left > (kLoads - 1) * kTogether; tokens_left -= kLoads * kTogether) {
      uint4 chunks[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) chunks[i] = load_global(reinterpret_cast<const uint4*>(row + pitch * i));
      row += pitch * kLoads;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) to[i * kNext] = chunks[i];
      to += kLoads * kNext;
    }
#pragma unroll 1
    for (; tokens_left > 0; tokens_left -= kTogether, row += pitch, to += kNext) {
      *to = load_global(reinterpret_cast<const uint4*>(row));
    }
  }

  // Makes the thread's chunk of each token of eight columns of x; a column of -1 is 0.
  static __device__ __forceinline__ void gather_chunks(const char* row, int64_t pitch, const int32_t (&x_columns)[8],
                                                       uint4* to, int tokens_left) {
#pragma unroll 1
    for (; tokens_left > 0; tokens_left -= kTogether, row += pitch, to += kNext) {
      __align__(16) T values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = x_columns[e] < 0 ? rounded<T>(0.0f) : reinterpret_cast<const T*>(row)[x_columns[e]];
      }
      *to = *reinterpret_cast<const uint4*>(values);
    }
  }
};

}  // namespace exllama::cuda
