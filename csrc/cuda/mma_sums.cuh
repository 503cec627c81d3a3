// The sums of a lane of gemm_mma: products of a step, scaled at the end of a unit, added up over the warps along K.
//
// The fragments of the PTX ISA say where a lane's sums lie. Sum [octet][pair][i] belongs to the column 2 pair + i / 2
// of the lane's four, and to the token 2 t + i % 2 of the octet.
#pragma once

#include "mma_operands.cuh"
#include "mma_shape.h"
#include "mma_stage.cuh"

namespace exllama::cuda {

// The numbers of a thread, which say what it computes of the tile.
struct MmaThread {
  int lane, g, t;  // lane 4 g + t of its warp
  int warp_n, warp_k;

  __device__ MmaThread() : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {
    const int warp = threadIdx.x / 32;
    warp_n = warp % kMmaWarpsN;
    warp_k = warp / kMmaWarpsN;
  }
};

template <int bits, typename T, int octets>
struct MmaSums {
  static constexpr int kSums = 8 * octets;
  // Where the warps along K leave their sums, but for the first.
  using OfWarps = float[kMmaWarpsK - 1][kMmaWarpsN][kSums][32];

  float total[octets][2][4] = {};
  float unit_sum[octets][2][4];  // of x * (q - z) in the present unit
  typename Pairs<bits, T>::Zero zero[4];

  // four: the negative zero points of the lane's columns, as Pairs has them.
  __device__ __forceinline__ void begin_unit(const uint4& four) {
    zero[0].set(four.x);
    zero[1].set(four.y);
    zero[2].set(four.z);
    zero[3].set(four.w);
#pragma unroll
    for (int i = 0; i < kSums; ++i) unit_sum[i / 8][i / 4 % 2][i % 4] = 0;
  }

  __device__ __forceinline__ void end_unit(const float4& four) {
    const float scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = total[i / 8][i / 4 % 2][i % 4];
      sum = fmaf(unit_sum[i / 8][i / 4 % 2][i % 4], scale[i % 8 / 2], sum);
    }
  }

  // Adds the products of a step. words: the lane's of the step, for each of its columns. x: its first chunk of token g
  // of the first octet; octets are octet_pitch apart.
  template <typename Lane>
  __device__ __forceinline__ void multiply_step(const Lane& lane, const uint32_t (&words)[4][Lane::kWords], const T* x,
                                                int octet_pitch) {
#pragma unroll
    for (int chunk = 0; chunk < Lane::kChunks; ++chunk) {
      uint4 b[octets];
#pragma unroll
      for (int octet = 0; octet < octets; ++octet) {
        b[octet] = *reinterpret_cast<const uint4*>(x + octet * octet_pitch + 32 * chunk);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int columns = 0; columns < 2; ++columns) {
          const int low = 2 * columns, high = 2 * columns + 1, pair = 4 * chunk + 2 * half;
          const uint32_t a[4] = {lane.pair(words[low], pair, zero[low]), lane.pair(words[high], pair, zero[high]),
                                 lane.pair(words[low], pair + 1, zero[low]),
                                 lane.pair(words[high], pair + 1, zero[high])};
#pragma unroll
          for (int octet = 0; octet < octets; ++octet) {
            mma<T>(unit_sum[octet][columns], a, half ? b[octet].z : b[octet].x, half ? b[octet].w : b[octet].y);
          }
        }
      }
    }
  }

  // Leaves the sums of a warp for the first one along K.
  __device__ __forceinline__ void leave(OfWarps& of_warps, const MmaThread& thread) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      of_warps[thread.warp_k - 1][thread.warp_n][i][thread.lane] = total[i / 8][i / 4 % 2][i % 4];
    }
  }

  // Adds the sums of the warps along K, from the first to the last, and calls store(token, column, sum) for each. The
  // tile has the tokens from first_token to end_token, and the lane's four columns begin at first_column of the result.
  template <typename Store>
  __device__ __forceinline__ void write_out(const OfWarps& of_warps, const MmaThread& thread, int64_t first_token,
                                            int64_t end_token, int64_t first_column, const Store& store) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float sum = total[i / 8][i / 4 % 2][i % 4];
#pragma unroll
      for (int other = 1; other < kMmaWarpsK; ++other) sum += of_warps[other - 1][thread.warp_n][i][thread.lane];
      const int64_t token = first_token + i / 8 * kOctet + 2 * thread.t + i % 2;
      if (token < end_token) store(token, first_column + i / 4 % 2 * 2 + i % 4 / 2, sum);
    }
  }
};

}  // namespace exllama::cuda
