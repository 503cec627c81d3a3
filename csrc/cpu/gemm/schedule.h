// The tasks of several products, one product after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace exllama::cpu {

class Schedule {
 public:
  // size_of(i) is how many tasks product i has.
  template <typename SizeOf>
  Schedule(int64_t products, const SizeOf& size_of) : ends_(static_cast<size_t>(products)) {
    int64_t end = 0;
    for (int64_t i = 0; i < products; ++i) ends_[static_cast<size_t>(i)] = end += size_of(i);
  }

  int64_t tasks() const { return ends_.back(); }

  // Calls f(product, first, last) for each product that has some of the tasks [begin, end): those are its own tasks
  // [first, last).
  template <typename F>
  void each(int64_t begin, int64_t end, const F& f) const {
    auto product = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    while (begin < end) {
      const int64_t before = product == 0 ? 0 : ends_[static_cast<size_t>(product - 1)];
      const int64_t stop = std::min(end, ends_[static_cast<size_t>(product)]);
      if (begin < stop) f(static_cast<int64_t>(product), begin - before, stop - before);
      begin = stop;
      ++product;
    }
  }

 private:
  std::vector<int64_t> ends_;  // of each product's tasks, counted from the first of all
};

}  // namespace exllama::cpu
