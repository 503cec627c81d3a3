// How the rows of a weight are cut into blocks, and scratch memory is cut into arrays.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu.h"

namespace exllama::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Block {
  int64_t row;
  int rows;
  int64_t group;
};

// Runs of at most `limit` rows that do not cross from one group into the next.
class Blocks {
 public:
  Blocks(const Weight& weight, int limit)
      : K_(weight.K), size_(grouped(weight) ? std::min(weight.group_size, weight.K) : weight.K), limit_(limit) {
    if (K_ == 0) return;
    per_group_ = ceil_div(size_, limit);
    count_ = K_ / size_ * per_group_ + ceil_div(K_ % size_, limit);
  }

  // Whether rows lie in runs of group_size; else each row has a group of its own (raw g_idx).
  static bool grouped(const Weight& weight) { return weight.g_idx() == nullptr; }

  int64_t count() const { return count_; }
  int longest() const { return static_cast<int>(std::min<int64_t>(size_, limit_)); }

  Block operator[](int64_t i) const {
    const int64_t group = i / per_group_;
    const int64_t begin = group * size_, row = begin + i % per_group_ * limit_;
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

// Hands out arrays of a workspace, each on a cache line of its own; without one it only counts bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return array;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// parallel.run for a callable of (task) or (task, worker); on the calling thread where there is one task or one thread.
template <typename Body>
void for_each(const Parallel& parallel, int64_t tasks, const Body& body) {
  const auto call = [](void* context, int64_t task, int32_t worker) {
    const Body& body = *static_cast<const Body*>(context);
    if constexpr (std::is_invocable_v<Body, int64_t, int32_t>) {
      body(task, worker);
    } else {
      body(task);
    }
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  if (tasks <= 1 || parallel.threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) call(context, task, 0);
    return;
  }
  parallel.run(parallel.self, tasks, call, context);
}

}  // namespace exllama::cpu
