// How gemm_mma cuts a product into pieces, and the sizes of these pieces.
//
// The kernel is made of these sizes, and gemm_mma.h counts with them.
//
//                          N, the columns of W
//                   thread block (64)            next thread block ...
//                  +------------+------------+------------
//                  | warp_n = 0 | warp_n = 1 |     A warp has 32 columns, a lane 4 of them.
//   K, the rows    | 32 columns | 32 columns |
//   of W           +------------+------------+
//
//   split 0 -+- stage 0 -+- run 0, warp_k = 0 -+- unit 0 -+- step 0
//            |           |                     |          +- step 1 ...
//            |           |                     +- unit 1 ...
//            |           +- run 1, warp_k = 1 ...
//            |           +- run 2, warp_k = 2 ...
//            |           +- run 3, warp_k = 3 ...
//            |           +- run 4, warp_k = 0 ...
//            +- stage 1 ...
//   split 1 ...
//
//   M, the rows of x -+- tile 0 -+- octet 0, tokens 0 to 7
//                     |          +- octet 1, tokens 8 to 15 ...
//                     +- tile 1 ...
//
//   word     rows                    what it is
//   split    whole runs              the rows of W that one thread block multiplies
//   stage    512 to 2048             the rows whose x and groups lie in shared memory at a time
//   run      128                     the rows that one warp takes; the warps along K take them in turn
//   unit     128, or 32              the rows of a run in one group; at its end the sums are scaled
//   step     128, 64 or 32           the rows that four lanes unpack and multiply together
//   turn     one or two runs         the rows of a warp in one trip of its loop
//   chunk    8                       the rows of x that a lane reads at once for a token: 16 bytes
//
//   octet    8 tokens                the columns of x^T in one tensor-core instruction
//   tile     1, 2 or 4 octets        the tokens and the 64 columns of the result that a thread block computes
#pragma once

#include "../layout/formats.h"

namespace exllama::cuda {

inline constexpr int kMmaWarpsN = 2, kMmaWarpsK = 4;
inline constexpr int kMmaThreads = 32 * kMmaWarpsN * kMmaWarpsK;
inline constexpr int kMmaColumns = 32 * kMmaWarpsN;  // of a tile
inline constexpr int kOctet = 8;
inline constexpr int kMmaOctets[] = {1, 2, 4};  // of a tile: a word is read once for all of them
inline constexpr int kMmaRunK = 128;
inline constexpr int kMmaMinUnitK = 32;
inline constexpr int kMmaStageBytes = 32 * 1024;

// The rows of a unit: a run, or less where groups are not whole runs. A group must be whole units.
EXLLAMA_HOST_DEVICE constexpr int mma_unit_k(int64_t K, int64_t group_size) {
  return group_size % kMmaRunK == 0 || group_size >= K ? kMmaRunK : kMmaMinUnitK;
}

// The rows of a step. Where the unit allows it, no two lanes need the same word.
EXLLAMA_HOST_DEVICE constexpr int mma_step_k(int bits, int unit_k) {
  if (unit_k == kMmaMinUnitK) return kMmaMinUnitK;
  return bits == 3 ? 128 : bits == 2 ? 64 : 32;
}

// Steps whose words a warp loads ahead: those of a run. Two runs are ahead if they are few loads and fit into a stage.
// The loads of a run are two for 2 bits and three for 3 bits.
EXLLAMA_HOST_DEVICE constexpr int mma_steps_ahead(int bits, int unit_k, int octets) {
  const int run_steps = kMmaRunK / mma_step_k(bits, unit_k);
  if (unit_k == kMmaMinUnitK) return bits == 3 ? run_steps / 2 : run_steps;
  return bits <= 3 && octets <= 2 ? 2 * run_steps : run_steps;
}

// The rows of a stage.
EXLLAMA_HOST_DEVICE constexpr int mma_stage_k(int unit_k, int octets) {
  return unit_k == kMmaRunK ? kMmaStageBytes / (2 * kOctet * octets) : kMmaWarpsK * kMmaRunK;
}

// Thread blocks that an SM shall have registers for. There are fewer where registers would be spilled.
EXLLAMA_HOST_DEVICE constexpr int mma_thread_blocks_per_sm(int bits, int octets) {
  return octets > 2 ? 1 : octets == 1 && bits == 4 ? 3 : 2;
}

}  // namespace exllama::cuda
