// gemm on the tensor cores for many tokens: x and W are copied into shared memory some stages ahead.
//
// pipeline_shape.h draws how the product is cut, and pipeline_stage.cuh has what is copied. The arithmetic is in
// mma_operands.cuh and mma_sums.cuh. It is that of gemm_mma but for the order in which its units are added up.
#pragma once

#include "mma_sums.cuh"
#include "pipeline_stage.cuh"
#include "split_k.cuh"
#include "tile.cuh"

namespace exllama::cuda {

// Whether the device code that is being compiled can have the kernel.
template <typename T>
__device__ constexpr bool has_copy_async() {
#ifdef __CUDA_ARCH__
  return has_mma<T>() && __CUDA_ARCH__ >= 800;
#else
  return false;
#endif
}

// The product of one tile and one split. It goes to out (M, columns), by way of splits if there are several.
template <int bits, typename T, int octets, int unit_k>
struct PipelinedProduct {
  using Stage = PipelineStage<bits, T, octets, unit_k>;
  using Copies = PipelineCopies<bits, T, octets, unit_k>;
  using Sums = MmaSums<bits, T, octets>;
  using Lane = typename Stage::Lane;
  static constexpr int kStages = pipeline_stages(bits, octets, unit_k);
  static_assert(kStages >= 2 && sizeof(Stage) == pipeline_stage_bytes(bits, octets, unit_k));
  static constexpr int kUnitStages = Stage::kUnitStages;
  static constexpr int kSteps = Stage::kK / Stage::kStepK;

  // Adds the products of a step: its words are unpacked once for all octets. Four octets are in flight, so that no
  // multiply-add waits for the one before it in its sum.
  static __device__ __forceinline__ void multiply_step(const Stage& stage, const Lane& lane, int warp, int g, int t,
                                                       int step, Sums& sums) {
    uint32_t words[4][Lane::kWords];
    stage.read_words(words, lane, warp, g, step);
#pragma unroll
    for (int chunk = 0; chunk < Lane::kChunks; ++chunk) {
      uint32_t a[2][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int columns = 0; columns < 2; ++columns) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 2 * columns + i % 2;
            a[half][columns][i] = lane.pair(words[column], 4 * chunk + 2 * half + i / 2, sums.zero[column]);
          }
        }
      }
      const T* x = &stage.x[g][Stage::place_of_x(g, 4 * (step * Lane::kChunks + chunk) + t)];
      constexpr int kTogether = 4;
#pragma unroll
      for (int first = 0; first < octets; first += kTogether) {
        uint4 b[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          b[i] = *reinterpret_cast<const uint4*>(x + (first + i) * kOctet * Stage::kK);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int columns = 0; columns < 2; ++columns) {
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              mma<T>(sums.unit_sum[first + i][columns], a[half][columns], half ? b[i].z : b[i].x,
                     half ? b[i].w : b[i].y);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply(const Parts& parts, const T* x, int64_t M, const MmaCut& cut,
                                                  const Splits& splits, T* out) {
    __shared__ Stage stages[kStages];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Tile tile(parts, kPipelineColumns, Stage::kTokens, M);
    if (tile.is_empty()) return;
    const Weight& weight = tile.weight;
    const auto K = static_cast<int32_t>(weight.K), N = static_cast<int32_t>(weight.N);
    const auto first_column = static_cast<int32_t>(tile.first_column);
    const auto tokens = static_cast<int>(min(tile.end_row - tile.first_row, static_cast<int64_t>(Stage::kTokens)));
    const auto split_k = tile.has_weight ? static_cast<int32_t>(cut.runs_per_split) * kMmaRunK : 0;
    const int32_t first_k = static_cast<int32_t>(blockIdx.y) * split_k, end_k = min(first_k + split_k, K);
    const int32_t count = (end_k - first_k + Stage::kK - 1) / Stage::kK;

    const uint32_t first_stage = shared_address(stages);
    Copies copies(weight, cut, x + tile.first_row * weight.K, tokens, first_column, first_k, end_k);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) copies.begin(first_stage + i * sizeof(Stage), i % kUnitStages, i + 1 == count);
      end_copies();
    }
    const Lane lane(t);
    const int four = 8 * warp + g;
    const uint32_t negative_zero = Pairs<bits, T>::negative_zero(weight.zero_offset);
    Sums sums;
    int slot = 0, free_slot = kStages - 1;  // of the present stage, and of the one before it
    for (int32_t first = 0; first < count; first += kUnitStages) {
      const Stage* stage = nullptr;
#pragma unroll
      for (int of_unit = 0; of_unit < kUnitStages; ++of_unit) {
        const int32_t i = first + of_unit;
        if (of_unit > 0 && i >= count) break;
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the stage is there for all, and all have read the one before it
        const int32_t next = i + kStages - 1;
        if (next < count) {
          copies.begin(first_stage + free_slot * sizeof(Stage), (of_unit + kStages - 1) % kUnitStages,
                       next + 1 == count);
        }
        end_copies();
        stage = &stages[slot];
        free_slot = slot;
        slot = slot + 1 < kStages ? slot + 1 : 0;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int k = of_unit * Stage::kK + step * Stage::kStepK, unit = k / unit_k % Stage::kUnits;
          if (Stage::kUnits > 1 && step > 0 && first_k + i * Stage::kK + k >= end_k) break;
          if (k % unit_k == 0) sums.begin_unit(stage->negative_zeros(unit, four, negative_zero));
          multiply_step(*stage, lane, warp, g, t, step, sums);
          if (Stage::kUnits > 1) sums.end_unit(stage->scales_of(unit, four, weight.scales_dtype));
        }
      }
      if (Stage::kUnits == 1) sums.end_unit(stage->scales_of(0, four, weight.scales_dtype));
    }

    const int32_t column = first_column + 4 * four;
    if (column < N) {
      const int64_t n = tile.columns_before + column;
      if (splits.partials) {
        float* const first = splits.partials + (blockIdx.y * M + tile.first_row) * parts.columns + n;
        write(sums, t, tokens, [&](int token, const float4& four_sums) {
          *reinterpret_cast<float4*>(first + token * parts.columns) = four_sums;
        });
      } else {
        T* const first = out + tile.first_row * parts.columns + n;
        const bool aligned = reinterpret_cast<uintptr_t>(out) % 8 == 0;
        write(sums, t, tokens, [&](int token, const float4& four_sums) {
          store_four(first + token * parts.columns, four_sums, aligned);
        });
      }
    }
    if (!splits.tickets) return;
    add_splits_of_tile<kPipelineColumns>(splits, M, parts.columns, tile.first_row, tokens,
                                         tile.columns_before + first_column, min(N - first_column, kPipelineColumns),
                                         [&](int64_t at, float sum) { out[at] = rounded<T>(sum); });
  }

  // Calls store(token, sums of the lane's four columns) for each token that is there.
  template <typename Store>
  static __device__ __forceinline__ void write(const Sums& sums, int t, int tokens, const Store& store) {
#pragma unroll
    for (int i = 0; i < 2 * octets; ++i) {
      const auto& pairs = sums.total[i / 2];
      const int token = i / 2 * kOctet + 2 * t + i % 2;
      if (token < tokens) {
        store(token, make_float4(pairs[0][i % 2], pairs[0][2 + i % 2], pairs[1][i % 2], pairs[1][2 + i % 2]));
      }
    }
  }

  // Rounds and stores four numbers that follow each other.
  static __device__ __forceinline__ void store_four(T* to, const float4& sums, bool aligned) {
    __align__(8) const T four[4] = {rounded<T>(sums.x), rounded<T>(sums.y), rounded<T>(sums.z), rounded<T>(sums.w)};
    if (aligned) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(four);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = four[i];
  }
};

template <int bits, typename T, int octets, int unit_k>
__global__ void __launch_bounds__(kPipelineThreads, pipeline_thread_blocks_per_sm(octets))
    gemm_pipelined(Parts parts, const T* x, int64_t M, MmaCut cut, Splits splits, T* out) {
  if constexpr (has_copy_async<T>()) {
    PipelinedProduct<bits, T, octets, unit_k>::multiply(parts, x, M, cut, splits, out);
  } else {
    __trap();  // select_gemm knows the archs
  }
}

}  // namespace exllama::cuda
