// What a product prefetches while it runs: the words of a panel to come.
//
// The words of a panel are pieces of many rows, each on another page. The hardware alone reads them at a quarter of
// the speed of DRAM. Prefetched all at once they fill the buffers between L1 and L2, and the product waits. So it takes
// a share of them, as far as L2, each time it goes on to other rows of x.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace exllama::cpu {

// Locality 3 is L1 and 2 is L2, on every architecture that gcc and clang compile for.
inline void prefetch_to_l1(const void* address) { __builtin_prefetch(address, 0, 3); }
inline void prefetch_to_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

struct Ahead {
  const char* base;
  const int32_t* next;  // offsets from base in bytes
  const int32_t* end;

  // One of `shares` equal shares of what is left.
  void prefetch(int shares) {
    const int32_t* stop = next + (end - next + shares - 1) / shares;
    for (; next < stop; ++next) prefetch_to_l2(base + *next);
  }
};

// The lines of `rows` rows of a weight by `columns` columns, wherever they begin.
class WordLines {
 public:
  WordLines(const Weight& weight, int rows, int columns) {
    for (int word = 0; word < rows * weight.bits / 32; ++word) {
      for (int column = 0; column < columns; column += 16) {
        offsets_[count_++] = static_cast<int32_t>((word * weight.N + column) * sizeof(uint32_t));
      }
    }
  }

  Ahead from(const uint32_t* words) const {
    return {reinterpret_cast<const char*>(words), offsets_, offsets_ + count_};
  }

 private:
  // 128 rows of 8 bits by 64 columns are 32 rows of 4 lines.
  int32_t offsets_[128];
  int count_ = 0;
};

}  // namespace exllama::cpu
