// The words of W that a lane of gemm_mma has in registers: they are loaded straight from global memory, steps ahead.
#pragma once

#include "mma_operands.cuh"
#include "mma_shape.h"
#include "overlap.cuh"

namespace exllama::cuda {

template <int bits, typename T, int octets, int unit_k>
struct WordsAhead {
  static constexpr int kStepK = mma_step_k(bits, unit_k);
  static constexpr int kRunSteps = kMmaRunK / kStepK, kStepRows = kStepK * bits / 32;  // rows of words
  static constexpr int kAhead = mma_steps_ahead(bits, unit_k, octets);
  // Registers are named at compile time, so a turn is whole runs and whole steps ahead.
  static constexpr int kTurnSteps = kAhead > kRunSteps ? kAhead : kRunSteps, kTurnRuns = kTurnSteps / kRunSteps;
  using Lane = MmaLane<bits, T, kStepK>;

  uint32_t words[kAhead][4][Lane::kWords] = {};  // [step][column][word]
  const char* turn;                              // the first word of the present turn
  int32_t rows_left;                             // rows of words from there to the end of the split

  // A lane's words from a row of words on, for four columns. N is a multiple of 4: for columns beyond it the last four
  // are read, and not written.
  __device__ __forceinline__ WordsAhead(const Weight& weight, int32_t column, int32_t first_row, int32_t end_row)
      : turn(reinterpret_cast<const char*>(weight.qweight + min(column, static_cast<int32_t>(weight.N) - 4)) +
             static_cast<int64_t>(first_row) * (4 * static_cast<int32_t>(weight.N))),
        rows_left(end_row - first_row) {}

  // Loads step i of the present turn, where a number beyond it is a step of the next one. Beyond K words stay as they
  // are, for x is 0 there. Rows are multiplied with the bytes between them to 64 bits in one instruction.
  __device__ __forceinline__ void load(int i, int32_t row_bytes) {
#pragma unroll
    for (int w = 0; w < Lane::kWords; ++w) {
      const int row = row_of_step(i) + w;
      if (row >= rows_left) continue;
      const uint4 four = load_global(reinterpret_cast<const uint4*>(turn + static_cast<int64_t>(row) * row_bytes));
      words[i % kAhead][0][w] = four.x;
      words[i % kAhead][1][w] = four.y;
      words[i % kAhead][2][w] = four.z;
      words[i % kAhead][3][w] = four.w;
    }
  }

  // The words of step i for each of the four columns.
  __device__ __forceinline__ const uint32_t (&of_step(int i) const)[4][Lane::kWords] { return words[i % kAhead]; }

  __device__ __forceinline__ void next_turn(int32_t row_bytes) {
    rows_left -= row_of_step(kTurnSteps);
    turn += static_cast<int64_t>(row_of_step(kTurnSteps)) * row_bytes;
  }

 private:
  // The first row of words of step i, counted from the turn's: between two runs of a warp lie those of the others.
  static __device__ constexpr int row_of_step(int i) {
    return (i / kRunSteps * kMmaWarpsK * kRunSteps + i % kRunSteps) * kStepRows;
  }
};

}  // namespace exllama::cuda
