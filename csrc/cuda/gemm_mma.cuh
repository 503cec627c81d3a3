// gemm on the tensor cores straight from the shuffled words, for x of 16 bits.
//
// mma_shape.h draws how the product is cut, and has the words that are used here. Each phase is in a file of its own:
//
//   mma_stage.cuh     lay x, scales and zero points into shared memory, stage by stage
//   mma_words.cuh     load words into the registers of the lane that unpacks them, steps ahead
//   mma_operands.cuh  unpack pairs of weights into the operands of the tensor cores
//   mma_sums.cuh      begin a unit, multiply a step, end a unit; add up the warps
#pragma once

#include "mma_operands.cuh"
#include "mma_shape.h"
#include "mma_stage.cuh"
#include "mma_sums.cuh"
#include "mma_words.cuh"
#include "overlap.cuh"
#include "split_k.cuh"
#include "tile.cuh"

namespace exllama::cuda {

// Where the tile of a thread block lies in the result. It lies in shared memory, for the loop would spill it.
struct PlaceInResult {
  int64_t row, end_row, column;
};

// The product of one tile and one split. It goes to out (M, columns), by way of splits if there are several.
template <int bits, typename T, int octets, int unit_k>
struct MmaProduct {
  using Stage = cuda::Stage<bits, T, octets, unit_k>;
  using Words = WordsAhead<bits, T, octets, unit_k>;
  using Sums = MmaSums<bits, T, octets>;
  using Lane = typename Stage::Lane;
  static constexpr int kWarpsRunK = kMmaWarpsK * kMmaRunK, kTurnK = Words::kTurnRuns * kWarpsRunK;
  static constexpr int kRunUnits = kMmaRunK / unit_k, kStageRuns = Stage::kK / kMmaRunK;
  // Rows after which a run may be left at the end of K. This saves little, but keeps the compiler from delaying loads.
  static constexpr int kExitK = unit_k < kMmaRunK / 2 ? unit_k : kMmaRunK / 2;

  union Shared {
    Stage stage;
    typename Sums::OfWarps of_warps;
  };

  // Multiplies the rows of a stage that are the warp's. k_left: rows from the warp's first one to the end of the stage.
  static __device__ __forceinline__ void multiply_stage(const Stage& stage, const MmaThread& thread, const Lane& lane,
                                                        int32_t k_left, int32_t row_bytes, Words& words, Sums& sums) {
    const T* x = &stage.x[thread.g][thread.warp_k * kMmaRunK + 8 * thread.t];
    const UnitGroup* groups = &stage.groups[thread.warp_k * kRunUnits][thread.warp_n * 8 + thread.g];
    for (; k_left > 0; k_left -= kTurnK) {
#pragma unroll
      for (int run = 0; run < Words::kTurnRuns; ++run) {
        if (run > 0 && k_left <= run * kWarpsRunK) break;
#pragma unroll
        for (int step = 0; step < Words::kRunSteps; ++step) {
          const int i = run * Words::kRunSteps + step, k = run * kWarpsRunK + step * Words::kStepK;
          if (step > 0 && k % kExitK == 0 && k_left <= k) break;
          const UnitGroup& group = groups[k / unit_k * Stage::kFours];
          if (k % unit_k == 0) sums.begin_unit(group.negative_zeros);
          sums.multiply_step(lane, words.of_step(i), x + k, kOctet * Stage::kPitch);
          words.load(i + Words::kAhead, row_bytes);
          if (unit_k < kMmaRunK) sums.end_unit(group.scales);
        }
        if (unit_k == kMmaRunK) sums.end_unit(groups[run * kWarpsRunK / unit_k * Stage::kFours].scales);
      }
      words.next_turn(row_bytes);
      x += kTurnK;
      groups += kTurnK / unit_k * Stage::kFours;
    }
  }

  static __device__ __forceinline__ void multiply(const Parts& parts, const T* x, int64_t M, const MmaCut& cut,
                                                  const Splits& splits, T* out) {
    __shared__ Shared shared;
    __shared__ StageSource source;
    __shared__ PlaceInResult place;
    const MmaThread thread;
    const Tile tile(parts, kMmaColumns, Stage::kTokens, M);
    if (tile.is_empty()) return;
    const Weight& weight = tile.weight;
    const auto K = static_cast<int32_t>(weight.K), N = static_cast<int32_t>(weight.N);
    const auto first_column = static_cast<int32_t>(tile.first_column);
    const int32_t column = first_column + thread.warp_n * 32 + 4 * thread.g;
    const auto tokens = static_cast<int>(min(tile.end_row - tile.first_row, static_cast<int64_t>(Stage::kTokens)));
    if (threadIdx.x == 0) {
      source = stage_source<bits>(weight, x + tile.first_row * K, tokens, first_column);
      place = {tile.first_row, tile.end_row, tile.columns_before + first_column};
    }

    const auto first_run = static_cast<int32_t>(blockIdx.y * cut.runs_per_split);
    const int32_t runs = tile.has_weight ? static_cast<int32_t>(cut.runs_per_split) : 0;
    const int32_t end_run = min(first_run + runs, (K + kMmaRunK - 1) / kMmaRunK);
    const auto end_row = static_cast<int32_t>(min(static_cast<int64_t>(end_run) * kMmaRunK, weight.K) * bits / 32);
    const Lane lane(thread.t);
    const int32_t first_row = (first_run + thread.warp_k) * Words::kRunSteps * Words::kStepRows + lane.first_word;
    Words words(weight, column, first_row, end_row);
#pragma unroll
    for (int i = 0; i < Words::kAhead; ++i) words.load(i, 4 * N);

    Sums sums;
    for (int32_t stage_run = first_run; stage_run < end_run; stage_run += kStageRuns) {
      const int32_t end = min(stage_run + kStageRuns, end_run);
      __syncthreads();  // the last stage has been read, and source is there
      shared.stage.load_x(weight, source, stage_run * kMmaRunK, end * kMmaRunK);
      // Units of the last run may lie beyond K.
      shared.stage.load_groups(weight, source, cut, stage_run * kRunUnits,
                               kRunUnits == 1 ? end : min(end * kRunUnits, (K + unit_k - 1) / unit_k));
      __syncthreads();
      // It is read from memory, or it would be a uniform register, which has to be copied for every load.
      const int32_t row_bytes = source.row_bytes;
      const int32_t k_left = min(end * kMmaRunK, K) - (stage_run + thread.warp_k) * kMmaRunK;
      multiply_stage(shared.stage, thread, lane, k_left, row_bytes, words, sums);
    }

    __syncthreads();  // the last stage has been read
    if (thread.warp_k > 0) sums.leave(shared.of_warps, thread);
    __syncthreads();
    const uint32_t tile_column = threadIdx.x / 4 * 4;  // of a lane of the first warps along K
    // 3 bits keep their column through the loop: without that, bfloat16 spills on sm_120. 4 bits would spill with it.
    const bool has_column = bits == 3 ? column < N : tile_column <= source.last_column;
    if (thread.warp_k == 0 && has_column) {
      const auto write = [&](const auto& store) {
        sums.write_out(shared.of_warps, thread, place.row, place.end_row, place.column + tile_column, store);
      };
      if (splits.partials) {
        float* const partials = splits.partials + blockIdx.y * M * parts.columns;
        write([&](int64_t token, int64_t n, float sum) { partials[token * parts.columns + n] = sum; });
      } else {
        write([&](int64_t token, int64_t n, float sum) { out[token * parts.columns + n] = rounded<T>(sum); });
      }
    }
    if (!splits.tickets) return;
    const int tile_columns = min(static_cast<int>(source.last_column) + 4, kMmaColumns);
    add_splits_of_tile<kMmaColumns>(splits, M, parts.columns, place.row, source.tokens, place.column, tile_columns,
                                    [&](int64_t at, float sum) { out[at] = rounded<T>(sum); });
  }
};

template <int bits, typename T, int octets, int unit_k>
__global__ void __launch_bounds__(kMmaThreads, mma_thread_blocks_per_sm(bits, octets))
    gemm_mma(Parts parts, const T* x, int64_t M, MmaCut cut, Splits splits, T* out) {
  if constexpr (has_mma<T>()) {
    wait_for_kernels_before();
    MmaProduct<bits, T, octets, unit_k>::multiply(parts, x, M, cut, splits, out);
  } else {
    __trap();  // select_gemm knows the archs
  }
}

}  // namespace exllama::cuda
