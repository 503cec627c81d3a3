// One product of x and weights that stand side by side.
#include "cpu/arena.h"
#include "cpu/gemm/product.h"
#include "cpu/parallel.h"

namespace exllama::cpu {

size_t gemm_workspace_bytes(const Weight* parts, int64_t count, int64_t M, Precision precision, int32_t threads) {
  Arena arena(nullptr);
  const PackedX x(arena, *parts, M, class_of(*parts, precision));
  arena.take<float>(threads * tile_sums(Parts{parts, count}.widest(), M));
  return arena.bytes();
}

void gemm(const Weight* parts, int64_t count, const void* x, DType x_dtype, int64_t M, void* out, Precision precision,
          void* workspace, const Parallel& parallel) {
  if (M == 0) return;
  Arena arena(workspace);
  const int64_t sums_of_tile = tile_sums(Parts{parts, count}.widest(), M);
  float* const sums = arena.take<float>(parallel.threads * sums_of_tile);
  Product product({parts, count}, x, x_dtype, M, out, class_of(*parts, precision), arena, sums, sums_of_tile);
  const int64_t entries = product.entries();
  if (M * parts->K < kParallelEntries) {
    product.pack(0, entries);
  } else {
    const int64_t tasks = 4 * parallel.threads;
    for_each(parallel, tasks,
             [&](int64_t task) { product.pack(entries * task / tasks, entries * (task + 1) / tasks); });
  }
  product.settle();
  product.divide(product.gemv() ? threads_for_columns(parallel, product.columns(), product.word_bytes())
                                : parallel.threads);
  for_each(parallel, product.tasks(), [&](int64_t task, int32_t worker) { product.run(task, worker); });
}

}  // namespace exllama::cpu
