// How gemm_pipelined cuts a product into pieces, and the sizes of these pieces.
//
// The words are those of mma_shape.h. Here a warp takes every row of W of its columns. x and W reach it through shared
// memory: while one stage is multiplied, the next ones are on their way.
//
//                          N, the columns of W
//                      thread block (128)             next thread block ...
//                  +------+------+------+------+------
//   K, the rows    | warp | warp | warp | warp |      A warp has 32 columns, a lane 4 of them.
//   of W           |  0   |  1   |  2   |  3   |
//                  +------+------+------+------+------
//
//   split 0 -+- stage 0 -+- step 0
//            |           +- step 1 ...
//            +- stage 1 ...
//
//   word     rows              what it is
//   split    whole runs        the rows of W that one thread block multiplies
//   stage    32, 64 or 128     the rows whose x, words and groups are copied together
//   unit     128, or 32        the rows in one group; at its end the sums are scaled
//   step     128, 64 or 32     the rows that four lanes unpack and multiply together
//   tile     4 or 8 octets     the tokens that a thread block multiplies, with 128 columns
#pragma once

#include "mma_shape.h"

namespace exllama::cuda {

inline constexpr int kPipelineWarps = 4;
inline constexpr int kPipelineThreads = 32 * kPipelineWarps;
inline constexpr int kPipelineColumns = 32 * kPipelineWarps;  // of a tile
inline constexpr int kPipelineOctets[] = {4, 8};              // of a tile: a word is unpacked once for all of them
// What every architecture lets a thread block have without a request of its own.
inline constexpr int kPipelineBytes = 48 * 1024;
inline constexpr int kMostStages = 5;  // in shared memory

// The rows of a stage: 4 KiB of words or fewer, and whole steps.
EXLLAMA_HOST_DEVICE constexpr int pipeline_stage_k(int bits) { return bits == 8 ? 32 : bits == 3 ? 128 : 64; }

// The bytes of a stage: words, x, and of each unit the scales and zero points.
EXLLAMA_HOST_DEVICE constexpr int pipeline_stage_bytes(int bits, int octets, int unit_k) {
  const int k = pipeline_stage_k(bits), units = unit_k < k ? k / unit_k : 1;
  return kPipelineColumns * k * bits / 8 + 2 * kOctet * octets * k + units * kPipelineColumns * (32 + bits) / 8;
}
EXLLAMA_HOST_DEVICE constexpr int pipeline_stages(int bits, int octets, int unit_k) {
  const int fitting = kPipelineBytes / pipeline_stage_bytes(bits, octets, unit_k);
  return fitting < kMostStages ? fitting : kMostStages;
}

// Thread blocks that an SM shall have registers and shared memory for.
EXLLAMA_HOST_DEVICE constexpr int pipeline_thread_blocks_per_sm(int octets) { return octets > 4 ? 2 : 3; }

}  // namespace exllama::cuda
