// A stage of gemm_pipelined in shared memory: words, x, scales and zero points of some rows of W, as they are copied.
#pragma once

#include <cstddef>

#include "copy_async.cuh"
#include "mma_operands.cuh"
#include "mma_stage.cuh"
#include "pipeline_shape.h"
#include "words.cuh"

namespace exllama::cuda {

template <int bits, typename T, int octets, int unit_k>
struct PipelineStage {
  static constexpr int kStepK = mma_step_k(bits, unit_k), kStepRows = kStepK * bits / 32;  // rows of words
  using Lane = MmaLane<bits, T, kStepK>;
  static_assert(Lane::kInOrder, "chunks of x are copied as they lie in memory");
  static constexpr int kK = pipeline_stage_k(bits), kRows = kK * bits / 32;
  static constexpr int kTokens = kOctet * octets;
  static constexpr int kUnits = unit_k < kK ? kK / unit_k : 1;       // in a stage
  static constexpr int kUnitStages = unit_k > kK ? unit_k / kK : 1;  // of a unit
  static constexpr int kFours = kPipelineColumns / 4;
  static constexpr int kZeroWords = kPipelineColumns * bits / 32;

  __align__(16) uint4 words[kPipelineWarps][kRows][8];  // a warp's, of four columns each: see place_of_words
  __align__(16) T x[kTokens][kK];                       // see place_of_x
  uint4 scales[kUnits][kFours];                         // of four columns: 8 or 16 bytes, as they lie in memory
  uint32_t zeros[kUnits][kZeroWords];                   // as they lie in memory

  // Where the words of a row for four columns lie. Eight lanes that read together have rows of four lanes and two fours
  // of columns: they meet every bank once.
  static __device__ __forceinline__ int place_of_words(int row, int four) {
    return four ^ 2 * (row / Lane::kWords % 4);
  }

  // Where a chunk of x lies for a token, in numbers. Eight lanes that read together have four chunks of two tokens that
  // follow each other: odd ones have the halves of 128 bytes exchanged.
  static __device__ __forceinline__ int place_of_x(int token, int chunk) {
    const int block = kK > 32 ? chunk / 4 ^ token % 2 : 0;
    return 32 * block + 8 * (chunk % 4);
  }

  // The words of a step for the lane's four columns.
  __device__ __forceinline__ void read_words(uint32_t (&read)[4][Lane::kWords], const Lane& lane, int warp, int g,
                                             int step) const {
#pragma unroll
    for (int w = 0; w < Lane::kWords; ++w) {
      const int row = step * kStepRows + lane.first_word + w;
      const uint4 four = words[warp][row][place_of_words(row, g)];
      read[0][w] = four.x;
      read[1][w] = four.y;
      read[2][w] = four.z;
      read[3][w] = four.w;
    }
  }

  // The negative zero points of a unit in four columns, as Pairs has them. first: that of a stored 0.
  __device__ __forceinline__ uint4 negative_zeros(int unit, int four, uint32_t first) const {
    const uint32_t* row = zeros[unit];
    const FourZeros<bits> stored([&](uint32_t word) { return row[word]; }, 4 * four);
    const auto of = [&](int i) { return first + stored.stored(i) * Pairs<bits, T>::kNextZero; };
    return make_uint4(of(0), of(1), of(2), of(3));
  }

  __device__ __forceinline__ float4 scales_of(int unit, int four, DType dtype) const {
    const uint4& raw = scales[unit][four];
    if (dtype == DType::kFloat32) return *reinterpret_cast<const float4*>(&raw);
    return floats_of(make_uint2(raw.x, raw.y), dtype);
  }
};

// A number that the compiler shall have in a register: it would rather compute it anew each time.
template <typename Integer>
__device__ __forceinline__ Integer kept(Integer number) {
  if constexpr (sizeof(Integer) == 4) {
    asm("" : "+r"(number));
  } else {
    asm("" : "+l"(number));
  }
  return number;
}

// What a thread copies of every stage: where it lies in global memory, and where it comes to lie in the stage.
template <int bits, typename T, int octets, int unit_k>
struct PipelineCopies {
  using Stage = PipelineStage<bits, T, octets, unit_k>;
  using Lane = typename Stage::Lane;
  // A thread has one chunk of x, and every kTogether-th token. A warp copies four rows of its words at once.
  static constexpr int kChunks = Stage::kK / 8, kTogether = kPipelineThreads / kChunks;
  static_assert(kTogether % 2 == 0, "a thread's tokens lie in the same half of 128 bytes");
  static constexpr int kTimes = (Stage::kRows + 3) / 4;

  const char* words;  // of the lane's first row
  uint32_t words_to[kTimes];
  int32_t row_bytes, rows_left;  // rows of words from the lane's to the end of the split

  const char* x;  // the thread's chunk of its first token
  uint32_t x_to;
  int64_t x_pitch;              // bytes between two of the thread's tokens
  int32_t tokens_left, k_left;  // rows of W from the chunk's first to the last
  bool aligned;                 // whether a chunk can be copied at once

  const char* group;  // of group 0: scales of four columns, or a word of zero points
  uint32_t group_to, group_pitch, group_bytes;
  uint32_t group_unit, end_unit, group_reciprocal;

  // x: of the tile, which has so many tokens. The split has the rows of W from first_k to end_k.
  __device__ __forceinline__ PipelineCopies(const Weight& weight, const MmaCut& cut, const T* tile_x, int tokens,
                                            int32_t first_column, int32_t first_k, int32_t end_k) {
    const auto K = static_cast<int32_t>(weight.K), N = static_cast<int32_t>(weight.N);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = lane / 8;
    const int32_t column = min(first_column + 32 * warp + 4 * (lane % 8), N - 4);
    row_bytes = 4 * N;
    words = reinterpret_cast<const char*>(weight.qweight + column) +
            static_cast<int64_t>(first_k / 32 * bits + row) * row_bytes;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int of_warp = row + 4 * i;
      words_to[i] = kept<uint32_t>(offsetof(Stage, words) + sizeof(uint4) * (8 * (warp * Stage::kRows + of_warp) +
                                                                             Stage::place_of_words(of_warp, lane % 8)));
    }
    rows_left = static_cast<int32_t>(static_cast<int64_t>(end_k - first_k) * bits / 32) - row;

    constexpr int kInStep = 4 * Lane::kChunks;
    const int chunk = threadIdx.x % kChunks, token = threadIdx.x / kChunks;
    const int32_t k = first_k + chunk / kInStep * Stage::kStepK + Lane::k_of(chunk % kInStep, 0);
    x = reinterpret_cast<const char*>(tile_x + token * weight.K + k);
    x_to = kept<uint32_t>(offsetof(Stage, x) + sizeof(T) * (Stage::kK * token + Stage::place_of_x(token, chunk)));
    x_pitch = kept(static_cast<int64_t>(kTogether * sizeof(T)) * weight.K);
    tokens_left = tokens - token;
    k_left = K - k;
    aligned = K % 8 == 0 && reinterpret_cast<uintptr_t>(tile_x) % 16 == 0;

    // Half of the threads have scales.
    constexpr int kScaleThreads = kPipelineThreads / 2;
    static_assert(Stage::kUnits * Stage::kFours <= kScaleThreads);
    static_assert(Stage::kUnits * Stage::kZeroWords <= kPipelineThreads - kScaleThreads);
    const int i = threadIdx.x % kScaleThreads;
    if (threadIdx.x < kScaleThreads) {
      const uint32_t bytes = weight.scales_dtype == DType::kFloat32 ? 4 : 2;
      const int unit = i / Stage::kFours, four = i % Stage::kFours;
      group_bytes = unit < Stage::kUnits ? 4 * bytes : 0;
      group =
          static_cast<const char*>(weight.scales) + static_cast<int64_t>(min(first_column + 4 * four, N - 4)) * bytes;
      group_pitch = bytes * static_cast<uint32_t>(N);
      group_to = offsetof(Stage, scales) + sizeof(uint4) * i;
      group_unit = first_k / unit_k + unit;
    } else {
      const int32_t in_row = static_cast<int32_t>(weight.N * bits / 32);
      const int unit = i / Stage::kZeroWords, word = i % Stage::kZeroWords;
      group_bytes = unit < Stage::kUnits ? 4 : 0;
      group = reinterpret_cast<const char*>(weight.qzeros + min(first_column / 32 * bits + word, in_row - 1));
      group_pitch = 4 * static_cast<uint32_t>(in_row);
      group_to = offsetof(Stage, zeros) + sizeof(uint32_t) * i;
      group_unit = first_k / unit_k + unit;
    }
    group_reciprocal = cut.group_reciprocal;
    end_unit = (end_k + unit_k - 1) / unit_k;
  }

  // Begins to copy the next stage, which is the of_unit-th of a unit, to an address in shared memory.
  __device__ __forceinline__ void begin(uint32_t stage, int of_unit, bool is_last) {
    copy_words(stage);
    copy_x(stage);
    copy_group(stage, of_unit == 0, of_unit + 1 == Stage::kUnitStages || is_last);
    if (of_unit + 1 == Stage::kUnitStages) group_unit += Stage::kUnits;
    words += static_cast<int64_t>(Stage::kRows) * row_bytes;
    rows_left -= Stage::kRows;
    x += Stage::kK * sizeof(T);
    k_left -= Stage::kK;
  }

 private:
  // Beyond K words stay as they are, for x is 0 there.
  __device__ __forceinline__ void copy_words(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      if (Stage::kRows % 4 && threadIdx.x % 32 / 8 + 4 * i >= Stage::kRows) continue;
      if (4 * i < rows_left) copy_async<16>(stage + words_to[i], words + static_cast<int64_t>(4 * i) * row_bytes);
    }
  }

  // Tokens that are not there keep what lies there. A column of the product depends on no other column of x.
  __device__ __forceinline__ void copy_x(uint32_t stage) const {
    constexpr uint32_t kPitch = kTogether * Stage::kK * sizeof(T);
    constexpr int kTokens = Stage::kTokens / kTogether;
    if (aligned) {
      const char* from = x;
#pragma unroll
      for (int i = 0; i < kTokens; ++i, from += x_pitch) {
        if (i * kTogether < tokens_left) copy_async<16>(stage + x_to + i * kPitch, from, k_left > 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kTokens && i * kTogether < tokens_left; ++i) {
      const T* const from = reinterpret_cast<const T*>(x + i * x_pitch);
      __align__(16) T values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = e < k_left ? from[e] : rounded<T>(0.0f);
      *static_cast<uint4*>(__cvta_shared_to_generic(stage + x_to + i * kPitch)) =
          *reinterpret_cast<const uint4*>(values);
    }
  }

  // Zero points are needed when a unit begins, and scales when it ends.
  __device__ __forceinline__ void copy_group(uint32_t stage, bool begins, bool ends) const {
    if (group_bytes == 4 ? !begins : !ends) return;
    if (Stage::kUnits > 1 && group_unit >= end_unit) return;
    const char* const from = group + static_cast<uint64_t>(group_pitch) * group_of_unit(group_unit, group_reciprocal);
    if (group_bytes == 4) copy_async<4>(stage + group_to, from);
    if (group_bytes == 8) copy_async<8>(stage + group_to, from);
    if (group_bytes == 16) copy_async<16>(stage + group_to, from);
  }
};

}  // namespace exllama::cuda
