// Checkpoint order <-> shuffled order of the words: a thread has a block of words of one column.
#pragma once

#include "words.cuh"

namespace exllama::cuda {

inline constexpr int kShuffleThreads = 128;

// out is in with the other order of bits. Row i of out is row perm[i] of in; without a perm, in may be out.
template <int bits, bool from_shuffled>
__global__ void reorder(const uint32_t* in, const int32_t* perm, int64_t K, int64_t N, uint32_t* out) {
  constexpr int kValues = layout::block_values(bits), kWords = layout::block_words(bits);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kShuffleThreads + threadIdx.x;
  if (thread >= K / kValues * N) return;
  const int64_t block = thread / N, column = thread % N;
  uint32_t words[kWords], result[kWords] = {};
  if (perm) {
    constexpr int kTogether = kValues < 8 ? kValues : 8;
#pragma unroll
    for (int first = 0; first < kValues; first += kTogether) {
      int32_t rows[kTogether];
      load_indices(perm + block * kValues + first, kTogether, K, rows);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        insert_value<bits, !from_shuffled>(result, first + j, read_value<bits, from_shuffled>(in, N, rows[j], column));
      }
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = in[(block * kWords + w) * N + column];
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      insert_value<bits, !from_shuffled>(result, j, value_of<bits, from_shuffled>(words, j));
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) out[(block * kWords + w) * N + column] = result[w];
}

static __global__ void invert_permutation(const int32_t* perm, int64_t K, int32_t* inverse) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kShuffleThreads + threadIdx.x;
  if (k < K) inverse[checked_index(perm[k], K)] = static_cast<int32_t>(k);
}

}  // namespace exllama::cuda
