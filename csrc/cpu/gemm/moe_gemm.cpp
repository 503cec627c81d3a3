// Products of several experts, each with rows of x of its own: batch after batch, and those of a batch together.
#include <algorithm>
#include <deque>

#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/schedule.h"
#include "cpu/parallel.h"

namespace exllama::cpu {
namespace {

// x of a batch, packed, is at most so long for each thread, or that of one expert. It then stays in L2, where all of x
// would leave the caches. Its memory would be new at every call too, and the system clears new memory page by page.
constexpr size_t kBatchBytes = 1 << 20;

// Into how many tasks each of some equal products is cut: as few as give no thread a sixteenth more than its share.
int64_t pieces_of(int64_t products, int32_t threads) {
  int64_t pieces = 1;
  while (16 * ceil_div(products * pieces, threads) * threads > 17 * products * pieces) ++pieces;
  return pieces;
}

int64_t most_tile_sums(const Expert* experts, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, tile_sums(experts[i].weight.N, experts[i].rows));
  return most;
}

size_t packed_bytes(const Expert& expert, Precision precision) {
  Arena arena(nullptr);
  const PackedX x(arena, expert.weight, expert.rows, class_of(expert.weight, precision));
  return arena.bytes();
}

// Calls f(experts, count, bytes) for each batch, with the bytes of its packed x.
template <typename F>
void each_batch(const Expert* experts, int64_t count, Precision precision, int32_t threads, const F& f) {
  for (int64_t begin = 0, end; begin < count; begin = end) {
    size_t bytes = packed_bytes(experts[begin], precision);
    for (end = begin + 1; end < count; ++end) {
      const size_t more = packed_bytes(experts[end], precision);
      if (bytes + more > static_cast<size_t>(threads) * kBatchBytes) break;
      bytes += more;
    }
    f(experts + begin, end - begin, bytes);
  }
}

// The products of a batch.
class Together {
 public:
  Together(const Expert* experts, int64_t count, const void* x, DType x_dtype, void* out, Precision precision,
           Arena& arena, float* sums, int64_t tile_sums) {
    for (const Expert* expert = experts; expert != experts + count; ++expert) {
      const Weight& weight = expert->weight;
      entries_of_x_ += expert->rows * weight.K;
      products_.emplace_back(Parts{&weight, 1}, offset(x, x_dtype, expert->first_row * weight.in_features), x_dtype,
                             expert->rows, offset(out, x_dtype, expert->first_row * weight.N),
                             class_of(weight, precision), arena, sums, tile_sums);
    }
  }

  void run(const Parallel& parallel) {
    pack(parallel);
    const Parallel dividing = divide(parallel);
    const Schedule schedule(count(), [&](int64_t i) { return product(i).tasks(); });
    for_each(dividing, schedule.tasks(), [&](int64_t task, int32_t worker) {
      schedule.each(task, task + 1, [&](int64_t i, int64_t own, int64_t) { product(i).run(own, worker); });
    });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(products_.size()); }
  Product& product(int64_t i) { return products_[static_cast<size_t>(i)]; }

  void pack(const Parallel& parallel) {
    const Schedule schedule(count(), [&](int64_t i) { return product(i).entries(); });
    const int64_t entries = schedule.tasks(), tasks = entries_of_x_ < kParallelEntries ? 1 : 4 * parallel.threads;
    for_each(parallel, tasks, [&](int64_t task) {
      schedule.each(entries * task / tasks, entries * (task + 1) / tasks,
                    [&](int64_t i, int64_t first, int64_t last) { product(i).pack(first, last); });
    });
  }

  // All products together are divided as one is, and each has its part of the tasks. Returns the threads for them.
  Parallel divide(const Parallel& parallel) {
    bool gemv = true;
    for (Product& each : products_) {
      each.settle();
      gemv &= each.gemv();
    }
    Parallel dividing = parallel;
    if (gemv) {
      dividing.threads =
          threads_for_columns(parallel, count() * product(0).columns(), count() * product(0).word_bytes());
    }
    const int64_t pieces = pieces_of(count(), dividing.threads);
    for (Product& each : products_) {
      const int64_t most = std::max<int64_t>(1, each.columns() / kColumnsOfThread);
      each.divide(static_cast<int32_t>(each.gemv() ? std::min(pieces, most) : ceil_div(dividing.threads, count())));
    }
    return dividing;
  }

  std::deque<Product> products_;
  int64_t entries_of_x_ = 0;
};

}  // namespace

size_t moe_gemm_workspace_bytes(const Expert* experts, int64_t count, Precision precision, int32_t threads) {
  Arena arena(nullptr);
  arena.take<float>(threads * most_tile_sums(experts, count));
  size_t most = 0;
  each_batch(experts, count, precision, threads,
             [&](const Expert*, int64_t, size_t bytes) { most = std::max(most, bytes); });
  return arena.bytes() + most;
}

void moe_gemm(const Expert* experts, int64_t count, const void* x, DType x_dtype, void* out, Precision precision,
              void* workspace, const Parallel& parallel) {
  Arena arena(workspace);
  const int64_t tile_sums = most_tile_sums(experts, count);
  float* const sums = arena.take<float>(parallel.threads * tile_sums);
  each_batch(experts, count, precision, parallel.threads, [&](const Expert* some, int64_t of_them, size_t) {
    Arena rest = arena;  // each batch has the memory of the last
    Together(some, of_them, x, x_dtype, out, precision, rest, sums, tile_sums).run(parallel);
  });
}

}  // namespace exllama::cpu
