// gemm on the tensor cores straight from the shuffled words, for x of 16 bits; mma_operands.cuh says how.
//
// A warp has 32 columns and goes through its runs of K in steps, which four lanes share. A unit, which is a run or a
// step, lies in one group: at its end the sums are scaled. What all lanes need of x and of the groups, the thread block
// lays into shared memory, a stage at a time; words go straight to the registers of the lane that unpacks them.
#pragma once

#include <type_traits>

#include "mma_operands.cuh"
#include "parts.h"
#include "tiles.h"
#include "words.cuh"

namespace exllama::cuda {

struct MmaShape {
  int64_t runs_per_split;
  uint32_t group_reciprocal;  // ceil(2**32 / (2 * units in a group)): see divide_units
};

// unit / units_per_group by a multiplication: exact while their product is below 2**30 (Granlund and Montgomery 1994).
__device__ inline uint32_t divide_units(uint32_t unit, uint32_t reciprocal) {
  return __umulhi(2 * unit + 1, reciprocal);
}

// The group of a unit in four columns.
struct __align__(16) MmaGroups {
  float4 scales;
  uint4 negative_zeros;  // as Pairs has them
};

// What a thread block must know at every stage: kept in shared memory, since the loop has no registers to spare, and
// what the compiler would rather compute anew each time are 64-bit products.
struct __align__(16) MmaBlock {
  const char* x;  // the first token
  int64_t x_pitch;  // bytes between tokens
  const char* zeros;  // of the first group and the first column
  const char* scales;
  uint32_t zeros_pitch, scales_pitch;  // bytes between groups
  uint32_t last_column;  // of which there are three more: counted from the first one on
  uint32_t negative_zero;  // of what is stored as 0, as Pairs has it
  int32_t tokens;
  int32_t in_order_k;  // rows of W whose chunks of x can be read at once: all or none
  int32_t row_bytes;   // between two rows of words
};

template <int bits, typename T>
__device__ MmaBlock mma_block(const Weight& weight, const T* x, int tokens, int32_t first_column) {
  const uint32_t N = static_cast<uint32_t>(weight.N), scale_bytes = weight.scales_dtype == DType::kFloat32 ? 4 : 2;
  MmaBlock block;
  block.x = reinterpret_cast<const char*>(x);
  block.x_pitch = weight.K * static_cast<int64_t>(sizeof(T));
  block.zeros = reinterpret_cast<const char*>(weight.qzeros + static_cast<int64_t>(first_column) * bits / 32);
  block.scales = static_cast<const char*>(weight.scales) + static_cast<int64_t>(first_column) * scale_bytes;
  block.zeros_pitch = static_cast<uint32_t>(weight.N * bits / 8);
  block.scales_pitch = N * scale_bytes;
  block.last_column = N - 4 - first_column;
  block.negative_zero = Pairs<bits, T>::negative_zero(weight.zero_offset);
  block.tokens = tokens;
  const bool in_order = !weight.row_order && weight.K % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  block.in_order_k = in_order ? static_cast<int32_t>(weight.K) : 0;
  block.row_bytes = 4 * static_cast<int32_t>(weight.N);
  return block;
}

// What a thread block has of x and of the scales and zero points at a time: of a stage of K.
template <int bits, typename T, int tiles, int unit_k>
struct MmaStage {
  using Lane = MmaLane<bits, T, mma_step_k(bits, unit_k)>;
  static constexpr int kK = mma_stage_k(unit_k, tiles);
  static constexpr int kTokens = kMmaTokens * tiles;
  // Rows of x are 64 bytes apart modulo 128: the 16-byte reads of two tokens by four lanes meet every bank once.
  static constexpr int kPitch = kK + 32;
  static constexpr int kUnits = kK / unit_k;

  __align__(16) T x[kTokens][kPitch];  // [token][step][chunk]: see MmaLane
  MmaGroups groups[kUnits][kMmaColumns / 4];

  // What belongs to the rows of W from first_k to end_k. Tokens that are not there keep what lies there, or get another's
  // numbers: a column of the product depends on no other column of x.
  __device__ void load_x(const Weight& weight, const MmaBlock& block, int32_t first_k, int32_t end_k) {
    constexpr int kChunks = kK / 8, kInStep = 4 * Lane::kChunks;
    // Tokens that are loaded at a time, and how often.
    constexpr int kTogether = kMmaThreads / kChunks, kTimes = kTokens / kTogether;
    constexpr int kLoads = kTimes < 4 ? kTimes : 4;
    static_assert(kTimes % kLoads == 0);
    const auto K = static_cast<int32_t>(weight.K);
    const int chunk = threadIdx.x % kChunks;
    const int32_t step_k = first_k + (chunk - chunk % kInStep) * 8;
    if (step_k >= end_k) return;
    const auto k_of = [&](int e) { return step_k + Lane::k_of(chunk % kInStep, e); };
    const int first = kTogether == 1 ? 0 : threadIdx.x / kChunks;
    int left = block.tokens - first;
    const int64_t pitch = block.x_pitch * kTogether;
    const char* row = block.x + block.x_pitch * first;
    auto* to = reinterpret_cast<uint4*>(&x[first][8 * chunk]);
    constexpr int kNext = kTogether * kPitch * sizeof(T) / sizeof(uint4);
    if (Lane::kInOrder && k_of(0) < block.in_order_k) {
      row += sizeof(T) * static_cast<uint32_t>(k_of(0));
#pragma unroll 1
      for (; left > (kLoads - 1) * kTogether; left -= kLoads * kTogether) {
        uint4 chunks[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) chunks[i] = __ldg(reinterpret_cast<const uint4*>(row + pitch * i));
        row += pitch * kLoads;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) to[i * kNext] = chunks[i];
        to += kLoads * kNext;
      }
#pragma unroll 1
      for (; left > 0; left -= kTogether, row += pitch, to += kNext) *to = __ldg(reinterpret_cast<const uint4*>(row));
      return;
    }
    int32_t source[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      source[e] = k_of(e) < K ? static_cast<int32_t>(source_row(weight, k_of(e))) : -1;
    }
#pragma unroll 1
    for (; left > 0; left -= kTogether, row += pitch, to += kNext) {
      __align__(16) T values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = source[e] < 0 ? rounded<T>(0.0f) : reinterpret_cast<const T*>(row)[source[e]];
      }
      *to = *reinterpret_cast<const uint4*>(values);
    }
  }

  // Of the units from first_unit to end_unit: a thread has four columns of one unit.
  __device__ void load_groups(const Weight& weight, const MmaBlock& block, const MmaShape& shape,
                              uint32_t first_unit, uint32_t end_unit) {
    constexpr int kFours = kMmaColumns / 4;
    static_assert(kUnits * kFours <= kMmaThreads);
    const uint32_t unit = threadIdx.x / kFours, four = threadIdx.x % kFours;
    if (first_unit + unit >= end_unit) return;
    const uint32_t column = min(4 * four, block.last_column);
    const uint32_t group = divide_units(first_unit + unit, shape.group_reciprocal);
    const char* const row_of_zeros = block.zeros + static_cast<uint64_t>(block.zeros_pitch) * group;
    const FourZeros<bits> zeros(reinterpret_cast<const uint32_t*>(row_of_zeros), column);
    const char* const scales = block.scales + static_cast<uint64_t>(block.scales_pitch) * group;
    const auto negative_zero = [&](int i) { return block.negative_zero + zeros.stored(i) * Pairs<bits, T>::kNextZero; };
    static_assert(sizeof(groups) == kUnits * kFours * sizeof(MmaGroups));
    (&groups[0][0])[threadIdx.x] = {load_four(scales, weight.scales_dtype, column),
                          make_uint4(negative_zero(0), negative_zero(1), negative_zero(2), negative_zero(3))};
  }
};

// partials (split_k, M, columns) if there are several splits, else out (M, columns). tiles: of eight tokens, in a thread
// block.
template <int bits, typename T, int tiles, int unit_k>
__device__ __forceinline__ void multiply(const Parts& parts, const T* x, int64_t M, const MmaShape& shape,
                                         float* partials, T* out) {
  using Stage = MmaStage<bits, T, tiles, unit_k>;
  using Lane = typename Stage::Lane;
  constexpr int step_k = mma_step_k(bits, unit_k);
  constexpr int kRunSteps = kMmaRunK / step_k, kStepWords = step_k * bits / 32;
  constexpr int kAhead = mma_steps_ahead(bits, unit_k, tiles);
  // Registers are named at compile time, so a turn of the loop is whole runs and whole steps ahead.
  constexpr int kTurn = kAhead > kRunSteps ? kAhead : kRunSteps, kTurnRuns = kTurn / kRunSteps;
  constexpr int kWarpsRunK = kMmaWarpsK * kMmaRunK, kTurnK = kTurnRuns * kWarpsRunK;
  constexpr int kExitK = unit_k < kMmaRunK / 2 ? unit_k : kMmaRunK / 2;
  constexpr int kSums = 8 * tiles;  // of a lane
  __shared__ union {
    Stage stage;
    float sums[kMmaWarpsK - 1][kMmaWarpsN][kSums][32];
  } shared;
  __shared__ MmaBlock block;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_n = warp % kMmaWarpsN, warp_k = warp / kMmaWarpsN;
  const Tile of_block(parts, kMmaColumns, Stage::kTokens);
  const Weight& weight = of_block.weight;
  const auto K = static_cast<int32_t>(weight.K), N = static_cast<int32_t>(weight.N);
  const auto first_column = static_cast<int32_t>(of_block.first_column);
  const int32_t column = first_column + warp_n * 32 + 4 * g;
  // For 3 bits in 32 bits, for which mma_can sees to M: a register less, without which bfloat16 spills on sm_90. With 4
  // bits it spills on sm_80 with it.
  using Token = std::conditional_t<bits == 3, int32_t, int64_t>;
  const auto first_token = static_cast<Token>(of_block.first_row);
  const auto tokens = static_cast<int>(min(M - first_token, static_cast<int64_t>(Stage::kTokens)));
  if (threadIdx.x == 0) block = mma_block<bits>(weight, x + static_cast<int64_t>(first_token) * K, tokens, first_column);

  const auto first_run = static_cast<int32_t>(blockIdx.y * shape.runs_per_split);
  const int32_t end_run = min(first_run + static_cast<int32_t>(shape.runs_per_split), (K + kMmaRunK - 1) / kMmaRunK);
  const auto end_row = static_cast<int32_t>(min(static_cast<int64_t>(end_run) * kMmaRunK, weight.K) * bits / 32);

  // Rows of words and bytes between them are multiplied to 64 bits in one instruction. N is a multiple of 4: what lies
  // beyond is read from the last columns and not written. Beyond K words stay as they are, for x is 0 there.
  const Lane mine(t);
  const auto row_of_step = [&](int i) { return (i / kRunSteps * kMmaWarpsK * kRunSteps + i % kRunSteps) * kStepWords; };
  const int32_t first_row = (first_run + warp_k) * kRunSteps * kStepWords + mine.first_word;
  int32_t rows_left = end_row - first_row;
  const char* next_words = reinterpret_cast<const char*>(weight.qweight + min(column, N - 4)) +
                           static_cast<int64_t>(first_row) * (4 * N);
  uint32_t words[kAhead][4][Lane::kWords] = {};
  // Of step i from the present turn on.
  const auto load_words = [&](int i, int32_t row_bytes) {
#pragma unroll
    for (int w = 0; w < Lane::kWords; ++w) {
      const int row = row_of_step(i) + w;
      if (row >= rows_left) continue;
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(next_words + static_cast<int64_t>(row) * row_bytes));
      words[i % kAhead][0][w] = four.x;
      words[i % kAhead][1][w] = four.y;
      words[i % kAhead][2][w] = four.z;
      words[i % kAhead][3][w] = four.w;
    }
  };

  float total[tiles][2][4] = {}, unit_sum[tiles][2][4];
  typename Pairs<bits, T>::Zero zero[4];
  const auto begin_unit = [&](const MmaGroups& groups) {
    const uint4 four = groups.negative_zeros;
    zero[0].set(four.x);
    zero[1].set(four.y);
    zero[2].set(four.z);
    zero[3].set(four.w);
#pragma unroll
    for (int i = 0; i < kSums; ++i) unit_sum[i / 8][i / 4 % 2][i % 4] = 0;
  };
  const auto end_unit = [&](const MmaGroups& groups) {
    const float4 four = groups.scales;
    const float scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = total[i / 8][i / 4 % 2][i % 4];
      sum = fmaf(unit_sum[i / 8][i / 4 % 2][i % 4], scale[i % 8 / 2], sum);
    }
  };

#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_words(i, 4 * N);
  constexpr int kStageRuns = Stage::kK / kMmaRunK, kRunUnits = kMmaRunK / unit_k;
  for (int32_t stage_run = first_run; stage_run < end_run; stage_run += kStageRuns) {
    const int32_t end = min(stage_run + kStageRuns, end_run);
    __syncthreads();  // the last stage has been read, and block is there
    shared.stage.load_x(weight, block, stage_run * kMmaRunK, end * kMmaRunK);
    // Of the last run, units may lie beyond K.
    shared.stage.load_groups(weight, block, shape, stage_run * kRunUnits,
                             kRunUnits == 1 ? end : min(end * kRunUnits, (K + unit_k - 1) / unit_k));
    __syncthreads();
    const T* s_x = &shared.stage.x[g][warp_k * kMmaRunK + 8 * t];
    const MmaGroups* groups = &shared.stage.groups[warp_k * kRunUnits][warp_n * 8 + g];
    // From memory, or it would be a uniform register, which has to be copied for every load.
    const int32_t row_bytes = block.row_bytes;
    int32_t k_left = min(end * kMmaRunK, K) - (stage_run + warp_k) * kMmaRunK;
    for (; k_left > 0; k_left -= kTurnK) {
#pragma unroll
      for (int r = 0; r < kTurnRuns; ++r) {
        if (r > 0 && k_left <= r * kWarpsRunK) break;
#pragma unroll
        for (int step = 0; step < kRunSteps; ++step) {
          const int i = r * kRunSteps + step, k = r * kWarpsRunK + step * step_k;
          // Beyond K there are no units. Within one, leaving saves little, but keeps the compiler from delaying loads.
          if (step > 0 && k % kExitK == 0 && k_left <= k) break;
          if (k % unit_k == 0) begin_unit(groups[k / unit_k * kMmaColumns / 4]);
#pragma unroll
          for (int chunk = 0; chunk < Lane::kChunks; ++chunk) {
            uint4 b[tiles];
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile) {
              b[tile] = *reinterpret_cast<const uint4*>(s_x + 8 * tile * Stage::kPitch + k + 32 * chunk);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int columns = 0; columns < 2; ++columns) {
                const int low = 2 * columns, high = 2 * columns + 1, pair = 4 * chunk + 2 * half;
                const auto& word = words[i % kAhead];
                const uint32_t a[4] = {mine.pair(word[low], pair, zero[low]), mine.pair(word[high], pair, zero[high]),
                                       mine.pair(word[low], pair + 1, zero[low]),
                                       mine.pair(word[high], pair + 1, zero[high])};
#pragma unroll
                for (int tile = 0; tile < tiles; ++tile) {
                  mma<T>(unit_sum[tile][columns], a, half ? b[tile].z : b[tile].x, half ? b[tile].w : b[tile].y);
                }
              }
            }
          }
          load_words(i + kAhead, row_bytes);
          if (unit_k < kMmaRunK) end_unit(groups[k / unit_k * kMmaColumns / 4]);
        }
        if (unit_k == kMmaRunK) end_unit(groups[r * kWarpsRunK / unit_k * kMmaColumns / 4]);
      }
      rows_left -= row_of_step(kTurn);
      next_words += static_cast<int64_t>(row_of_step(kTurn)) * row_bytes;
      s_x += kTurnK;
      groups += kTurnK / unit_k * kMmaColumns / 4;
    }
  }

  // The warps along K are added from the first to the last.
  __syncthreads();  // the last stage has been read
  if (warp_k > 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared.sums[warp_k - 1][warp_n][i][lane] = total[i / 8][i / 4 % 2][i % 4];
  }
  __syncthreads();
  if (warp_k > 0 || column >= N) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    float sum = total[i / 8][i / 4 % 2][i % 4];
#pragma unroll
    for (int other = 1; other < kMmaWarpsK; ++other) sum += shared.sums[other - 1][warp_n][i][lane];
    // Accumulator i of a tile: column 2 (i / 4) + i % 4 / 2 of the lane's, token 2 t + i % 2 of the tile.
    const int64_t token = first_token + i / 8 * 8 + 2 * t + i % 2;
    const int64_t n = of_block.columns_before + column + i / 4 % 2 * 2 + i % 4 / 2;
    if (token >= M) continue;
    if (partials) {
      partials[(blockIdx.y * M + token) * parts.columns + n] = sum;
    } else {
      out[token * parts.columns + n] = rounded<T>(sum);
    }
  }
}

template <int bits, typename T, int tiles, int unit_k>
__global__ void __launch_bounds__(kMmaThreads, mma_blocks_per_sm(bits, tiles))
    gemm_mma(Parts parts, const T* x, int64_t M, MmaShape shape, float* partials, T* out) {
  if constexpr (has_mma<T>()) {
    multiply<bits, T, tiles, unit_k>(parts, x, M, shape, partials, out);
  } else {
    __trap();  // select_gemm knows the archs
  }
}

}  // namespace exllama::cuda
