// The sizes of the gemm kernels' tiles, which the kernels are made of and select.h counts with.
#pragma once

#include "../layout/formats.h"

namespace exllama::cuda {

// gemm_scalar: a warp has 128 columns, and the warps of a thread block share the rows of W of a stage.
inline constexpr int kScalarWarps = 4;
inline constexpr int kScalarThreads = 32 * kScalarWarps;
inline constexpr int kScalarColumns = 128;
inline constexpr int kScalarStageK = 256;  // rows of W for which x lies in shared memory at a time
inline constexpr int kScalarMaxRows = 8;   // rows of x for which a word is read once

// gemm_mma: a warp has 32 columns; the warps along K share the runs of a split.
inline constexpr int kMmaWarpsN = 2, kMmaWarpsK = 4;
inline constexpr int kMmaThreads = 32 * kMmaWarpsN * kMmaWarpsK;
inline constexpr int kMmaColumns = 32 * kMmaWarpsN;
inline constexpr int kMmaRunK = 128;  // rows of W that a warp loads ahead of their use
inline constexpr int kMmaTokens = 8;  // of a tile
inline constexpr int kMmaMaxTiles = 4;
inline constexpr int kMmaStageBytes = 32 * 1024;

// Rows of W in a step, which four lanes share: every group must be a whole number of steps.
EXLLAMA_HOST_DEVICE constexpr int mma_step_k(int bits) { return bits == 3 ? 128 : bits == 2 ? 64 : 32; }
// Rows of W for which x lies in shared memory at a time.
EXLLAMA_HOST_DEVICE constexpr int mma_stage_k(int tiles) { return kMmaStageBytes / (2 * kMmaTokens * tiles); }

// gemm_tiled: 64 by 64 outputs of a thread block, 16 terms of their sums in shared memory at a time.
inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledRows = 64, kTiledColumns = 64, kTiledTerms = 32;

}  // namespace exllama::cuda
