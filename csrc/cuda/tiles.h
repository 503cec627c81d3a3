// The sizes of the gemm kernels' tiles, which the kernels are made of and select.h counts with.
#pragma once

#include "../layout/formats.h"

namespace exllama::cuda {

// gemm_scalar: a warp has 128 columns, and the warps of a thread block share the rows of W of a stage.
inline constexpr int kScalarWarps = 4;
inline constexpr int kScalarThreads = 32 * kScalarWarps;
inline constexpr int kScalarColumns = 128;
inline constexpr int kScalarWarpK = 64;  // rows of W that a warp has of a stage
inline constexpr int kScalarStageK = kScalarWarps * kScalarWarpK;  // for which x lies in shared memory at a time
inline constexpr int kScalarRows[] = {1, 2, 4, 8};  // of x, for which a word is read once

// gemm_mma: a warp has 32 columns; the warps along K share the runs of a split.
inline constexpr int kMmaWarpsN = 2, kMmaWarpsK = 4;
inline constexpr int kMmaThreads = 32 * kMmaWarpsN * kMmaWarpsK;
inline constexpr int kMmaColumns = 32 * kMmaWarpsN;
inline constexpr int kMmaRunK = 128;  // rows of W that a warp has of those that warps along K share
inline constexpr int kMmaTokens = 8;  // of a tile
inline constexpr int kMmaRows[] = {kMmaTokens, 2 * kMmaTokens, 4 * kMmaTokens};  // of x, for which a word is read once
inline constexpr int kMmaStageBytes = 32 * 1024;

inline constexpr int kMmaMinUnitK = 32;

// Rows of W that are multiplied before their sums are scaled: a run, or less where groups are not whole runs. A group
// must be whole units.
EXLLAMA_HOST_DEVICE constexpr int mma_unit_k(int64_t K, int64_t group_size) {
  return group_size % kMmaRunK == 0 || group_size >= K ? kMmaRunK : kMmaMinUnitK;
}
// Rows of W in a step, which four lanes share: where the unit allows it, no two lanes need the same word.
EXLLAMA_HOST_DEVICE constexpr int mma_step_k(int bits, int unit_k) {
  if (unit_k == kMmaMinUnitK) return kMmaMinUnitK;
  return bits == 3 ? 128 : bits == 2 ? 64 : 32;
}
// Steps that a warp loads ahead: a run, or two where they are few loads (two of 2 bits, three of 3) and fit into a
// stage.
EXLLAMA_HOST_DEVICE constexpr int mma_steps_ahead(int bits, int unit_k, int tiles) {
  const int run_steps = kMmaRunK / mma_step_k(bits, unit_k);
  if (unit_k == kMmaMinUnitK) return bits == 3 ? run_steps / 2 : run_steps;
  return bits <= 3 && tiles <= 2 ? 2 * run_steps : run_steps;
}
// Thread blocks that an SM shall have registers for; fewer where they would be spilled.
EXLLAMA_HOST_DEVICE constexpr int mma_blocks_per_sm(int bits, int tiles) {
  return tiles > 2 ? 1 : tiles == 1 && bits == 4 ? 3 : 2;
}

// Rows of W for which x, the scales and the zero points lie in shared memory at a time.
EXLLAMA_HOST_DEVICE constexpr int mma_stage_k(int unit_k, int tiles) {
  return unit_k == kMmaRunK ? kMmaStageBytes / (2 * kMmaTokens * tiles) : kMmaWarpsK * kMmaRunK;
}

// gemm_tiled: 64 by 64 outputs of a thread block, 32 terms of their sums in shared memory at a time.
inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledRows = 64, kTiledColumns = 64, kTiledTerms = 32;

}  // namespace exllama::cuda
