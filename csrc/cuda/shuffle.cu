#include "launch.h"
#include "shuffle.cuh"

namespace exllama::cuda {
namespace {

template <bool from_shuffled>
void launch_reorder(const uint32_t* in, const int32_t* perm, int64_t K, int64_t N, int32_t bits, uint32_t* out,
                    Stream stream) {
  const int64_t threads = K / layout::block_values(bits) * N;
  if (threads == 0) return;
  const unsigned grid = grid_of(divide_up(threads, kShuffleThreads), "shuffle");
  with_bits(bits, [&](auto constant) {
    reorder<constant(), from_shuffled><<<grid, kShuffleThreads, 0, to_cuda(stream)>>>(in, perm, K, N, out);
  });
  check(cudaGetLastError(), "shuffle");
}

size_t words_bytes(int64_t K, int64_t N, int32_t bits) { return static_cast<size_t>(K * bits / 32 * N) * 4; }

}  // namespace

size_t shuffle_workspace_bytes(int64_t K, int64_t N, int32_t bits, bool permuted) {
  return permuted ? words_bytes(K, N, bits) : 0;
}

size_t unshuffle_workspace_bytes(int64_t K, bool permuted) {
  return permuted ? static_cast<size_t>(K) * sizeof(int32_t) : 0;
}

void shuffle(uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, void* workspace,
             Stream stream) {
  const uint32_t* in = qweight;
  if (perm && K * N > 0) {
    check(cudaMemcpyAsync(workspace, qweight, words_bytes(K, N, bits), cudaMemcpyDeviceToDevice, to_cuda(stream)),
          "shuffle");
    in = static_cast<const uint32_t*>(workspace);
  }
  launch_reorder<false>(in, perm, K, N, bits, qweight, stream);
}

void unshuffle(const uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, uint32_t* out,
               void* workspace, Stream stream) {
  if (K * N == 0) return;
  if (perm) {
    auto* const inverse = static_cast<int32_t*>(workspace);
    fill_with_nan(inverse, K * static_cast<int64_t>(sizeof(int32_t)), stream, "unshuffle");
    const unsigned grid = grid_of(divide_up(K, kShuffleThreads), "unshuffle");
    invert_permutation<<<grid, kShuffleThreads, 0, to_cuda(stream)>>>(perm, K, inverse);
    check(cudaGetLastError(), "unshuffle");
    perm = inverse;
  }
  launch_reorder<true>(qweight, perm, K, N, bits, out, stream);
}

}  // namespace exllama::cuda
