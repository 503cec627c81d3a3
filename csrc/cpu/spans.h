// How the rows of a weight are cut into spans.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/cpu.h"

namespace exllama::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Span {
  int64_t row;
  int rows;
  int64_t group;
};

// Runs of at most `limit` rows that do not cross from one group into the next.
class Spans {
 public:
  Spans(const Weight& weight, int limit)
      : K_(weight.K), size_(grouped(weight) ? std::min(weight.group_size, weight.K) : weight.K), limit_(limit) {
    if (K_ == 0) return;
    per_group_ = ceil_div(size_, limit);
    count_ = K_ / size_ * per_group_ + ceil_div(K_ % size_, limit);
  }

  // Whether rows lie in runs of group_size; else each row has a group of its own (raw g_idx).
  static bool grouped(const Weight& weight) { return weight.g_idx() == nullptr; }

  int64_t count() const { return count_; }
  int longest() const { return static_cast<int>(std::min<int64_t>(size_, limit_)); }

  Span operator[](int64_t i) const {
    const int64_t group = per_group_ == 1 ? i : i / per_group_;  // a division takes longer than all else here
    const int64_t begin = group * size_, row = begin + (i - group * per_group_) * limit_;
    const int64_t end = std::min({row + limit_, begin + size_, K_});
    return {row, static_cast<int>(end - row), group};
  }

 private:
  int64_t K_;
  int64_t size_;
  int64_t limit_;
  int64_t per_group_ = 1;
  int64_t count_ = 0;
};

}  // namespace exllama::cpu
