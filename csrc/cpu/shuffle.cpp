// Checkpoint order <-> shuffled order of the words.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/spans.h"
#include "layout/dispatch.h"

namespace exllama::cpu {
namespace {

// Columns of a task. 32 values of them are 8 KiB, and a copy of all their rows stays in L2.
constexpr int kColumns = 64;

// Writes one block of words in the order `shuffled` from values [block_values][kColumns].
void pack_block(const int32_t* values, int bits, bool shuffled, int64_t N, int columns, uint32_t* words) {
  const layout::Format& format = layout::format_of(bits);
  for (int word = 0; word < format.block_words; ++word) std::memset(words + word * N, 0, columns * sizeof *words);
  for (int j = 0; j < format.block_values; ++j) {
    const layout::Place& place = format.place_of(j, shuffled);
    for (int i = 0; i < place.count; ++i) {
      const layout::Field field = place.fields[i];
      uint32_t* out = words + field.word * N;
      for (int n = 0; n < columns; ++n) out[n] |= field.put(static_cast<uint32_t>(values[j * kColumns + n]));
    }
  }
}

int64_t words_of_copy(int64_t K, int32_t bits) { return K * bits / 32 * kColumns; }

// out = in with the other order of bits: row i of out is row source[i] of in, or row i. Each worker copies its columns
// first: in may be out, and rows that follow one another are read faster than rows that are far apart.
void reorder(const uint32_t* in, bool in_shuffled, const int32_t* source, int64_t K, int64_t N, int bits, uint32_t* out,
             void* workspace, const Parallel& parallel) {
  const layout::Format& format = layout::format_of(bits);
  for_each(parallel, ceil_div(N, kColumns), [&](int64_t task, int32_t worker) {
    const int64_t column = task * kColumns;
    const int columns = static_cast<int>(std::min<int64_t>(kColumns, N - column));
    uint32_t* copy = static_cast<uint32_t*>(workspace) + worker * words_of_copy(K, bits);
    for (int64_t row = 0; row < K * bits / 32; ++row) {
      std::memcpy(copy + row * kColumns, in + row * N + column, columns * sizeof *copy);
    }
    int32_t values[32 * kColumns];
    for (int64_t block = 0; block < K / format.block_values; ++block) {
      for (int j = 0; j < format.block_values; ++j) {
        const int64_t k = block * format.block_values + j;
        unpack_row(copy, kColumns, bits, in_shuffled, source ? source[k] : k, 0, columns, values + j * kColumns);
      }
      pack_block(values, bits, !in_shuffled, N, columns, out + block * format.block_words * N + column);
    }
  });
}

}  // namespace

size_t shuffle_workspace_bytes(int64_t K, int32_t bits, int32_t threads) {
  return static_cast<size_t>(threads * words_of_copy(K, bits)) * sizeof(uint32_t);
}

void shuffle(uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, void* workspace,
             const Parallel& parallel) {
  reorder(qweight, false, perm, K, N, bits, qweight, workspace, parallel);
}

void unshuffle(const uint32_t* qweight, const int32_t* perm, int64_t K, int64_t N, int32_t bits, uint32_t* out,
               void* workspace, const Parallel& parallel) {
  std::vector<int32_t> inverse(perm ? static_cast<size_t>(K) : 0);
  for (int64_t k = 0; perm && k < K; ++k) inverse[static_cast<size_t>(perm[k])] = static_cast<int32_t>(k);
  reorder(qweight, true, perm ? inverse.data() : nullptr, K, N, bits, out, workspace, parallel);
}

}  // namespace exllama::cpu
