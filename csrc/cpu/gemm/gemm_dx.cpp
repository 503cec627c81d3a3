// dx = grad @ W^T in float32, with the scales inside the sum over columns.
//
// The panels are transposed, so that this is a product like gemm's. A tile is some rows of grad by some rows of W, in
// panels of kPanelColumns of them. It walks the columns of W in chunks, whose sums are added in ascending order.
#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "cpu/ahead.h"
#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/exact.h"
#include "cpu/gemm/partition.h"
#include "cpu/gemm/schedule.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace exllama::cpu {
namespace {

// Columns of W in a chunk, the depth of a product: two unpackings.
constexpr int kDepth = 2 * kPanelColumns;

// Entries of grad in float32: [chunk of columns][row][kDepth].
int64_t grad_entries(const Weight& weight, int64_t M) { return ceil_div(weight.N, kDepth) * M * kDepth; }

// One product, in three steps: load all rows of grad, divide the result into tasks, run them.
class GemmDx {
 public:
  // `sums` are for the tiles of each worker, tile_sums of them.
  GemmDx(const Weight& weight, const void* grad, DType dtype, int64_t M, void* dx, Arena& arena, float* sums,
         int64_t tile_sums)
      : weight_(weight),
        source_(grad),
        dtype_(dtype),
        M_(M),
        dx_(dx),
        grad_(arena.take<float>(grad_entries(weight, M))),
        sums_(sums),
        tile_sums_(tile_sums) {}
  GemmDx(const GemmDx&) = delete;

  int64_t rows() const { return M_; }
  void load(int64_t m) const {
    for (int64_t c = 0; c < chunks(); ++c) {
      const void* row = offset(source_, dtype_, m * weight_.N);
      isa_.load(row, dtype_, nullptr, c * kDepth, depth(c), grad_ + (c * M_ + m) * kDepth);
    }
  }

  void divide(int32_t threads) {
    partition_.emplace(M_, threads, [&](int64_t width) { return ceil_div(weight_.K, width); });
  }
  int64_t tasks() const { return partition_->tiles(); }

  void run(int64_t task, int32_t worker) const {
    const Tile tile = (*partition_)[task];
    const int64_t row = tile.range * partition_->width();
    multiply(tile.row, tile.rows, row, std::min(partition_->width(), weight_.K - row), sums_ + worker * tile_sums_);
  }

 private:
  int64_t chunks() const { return ceil_div(weight_.N, kDepth); }
  int depth(int64_t c) const { return static_cast<int>(std::min<int64_t>(kDepth, weight_.N - c * kDepth)); }

  // `rows` rows of grad from `begin` on by `width` rows of W from `row` on.
  void multiply(int64_t begin, int rows, int64_t row, int64_t width, float* acc) const {
    float ones[kPanelColumns];
    std::fill(ones, ones + kPanelColumns, 1.0f);
    const int64_t panels = ceil_div(width, kPanelColumns), panel_sums = rows * kPanelColumns;
    const WordLines lines(weight_, kPanelColumns, kDepth);
    std::fill(acc, acc + panels * panel_sums, 0.0f);
    for (int64_t c = 0; c < chunks(); ++c) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        alignas(64) float W[kDepth * kPanelColumns];
        const int64_t from = row + panel * kPanelColumns;
        const int panel_rows = rows_of(panel, width);
        unpack(from, panel_rows, c * kDepth, depth(c), W);
        Ahead ahead{};
        if (c + 1 < chunks()) ahead = lines.from(words_of(weight_, from, (c + 1) * kDepth));
        Multiply<float, float> product;
        product.x = grad_ + (c * M_ + begin) * kDepth;
        product.x_stride = kDepth;
        product.rows = rows;
        product.depth = depth(c);
        product.panel = W;
        product.columns = panel_rows;
        product.scales = ones;
        product.acc = acc + panel * panel_sums;
        isa_.multiply_float(product, ahead);
      }
    }
    bool finite = true;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int m = 0; m < rows; ++m) {
        finite &= store(acc + panel * panel_sums + m * kPanelColumns, begin + m, row + panel * kPanelColumns,
                        rows_of(panel, width));
      }
    }
    for (int m = 0; !finite && m < rows; ++m) {
      const ExactRow exact(offset(source_, dtype_, (begin + m) * weight_.N), dtype_, nullptr, weight_.N);
      for (int64_t panel = 0; panel < panels; ++panel) {
        exact.multiply_transposed(weight_, row + panel * kPanelColumns, rows_of(panel, width),
                                  acc + panel * panel_sums + m * kPanelColumns, dx_at(begin + m));
      }
    }
  }

  static int rows_of(int64_t panel, int64_t width) {
    return static_cast<int>(std::min<int64_t>(kPanelColumns, width - panel * kPanelColumns));
  }

  // scale * (q - z) as [column][row], group by group.
  void unpack(int64_t row, int rows, int64_t column, int columns, float* W) const {
    const int64_t group_size = Spans::grouped(weight_) ? std::min(weight_.group_size, weight_.K) : 1;
    for (int first = 0; first < rows;) {
      const int64_t k = row + first;
      const int64_t group = Spans::grouped(weight_) ? k / group_size : weight_.g_idx()[k];
      const int count = static_cast<int>(std::min<int64_t>(rows - first, group_size - k % group_size));
      for (int n = 0; n < columns; n += kPanelColumns) {
        int32_t zeros[kPanelColumns];
        float scales[kPanelColumns];
        const int some = std::min(kPanelColumns, columns - n);
        isa_.load_zeros(weight_, group, column + n, some, zeros);
        isa_.load_scales(weight_, group, column + n, some, scales);
        isa_.unpack_transposed(weight_, k, count, column + n, some, zeros, scales, W + n * kPanelColumns + first);
      }
      first += count;
    }
  }

  // Whether all sums are finite.
  bool store(const float* sums, int64_t m, int64_t row, int count) const {
    if (!weight_.perm()) return isa_.store(sums, count, offset(dx_at(m), dtype_, row), dtype_);
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      const int32_t k = weight_.perm()[row + i];
      if (k < 0) continue;
      store_float(sums[i], dx_at(m), dtype_, k);
      finite &= std::isfinite(sums[i]);
    }
    return finite;
  }

  void* dx_at(int64_t m) const { return offset(dx_, dtype_, m * weight_.in_features); }

  const Weight& weight_;
  const void* source_;
  DType dtype_;
  int64_t M_;
  void* dx_;
  float* grad_;
  float* sums_;
  int64_t tile_sums_;
  std::optional<Partition> partition_;
  const Kernels& isa_ = kernels();
};

}  // namespace

size_t gemm_dx_workspace_bytes(const Weight& weight, int64_t M, int32_t threads) {
  const Expert all{weight, 0, M};
  return moe_gemm_dx_workspace_bytes(&all, 1, threads);
}

void gemm_dx(const Weight& weight, const void* grad, DType grad_dtype, int64_t M, void* dx, void* workspace,
             const Parallel& parallel) {
  const Expert all{weight, 0, M};
  moe_gemm_dx(&all, 1, grad, grad_dtype, dx, workspace, parallel);
}

size_t moe_gemm_dx_workspace_bytes(const Expert* experts, int64_t count, int32_t threads) {
  Arena arena(nullptr);
  int64_t most_sums = 0;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    arena.take<float>(grad_entries(expert->weight, expert->rows));
    most_sums = std::max(most_sums, tile_sums(expert->weight.K, expert->rows));
  }
  arena.take<float>(threads * most_sums);
  return arena.bytes();
}

void moe_gemm_dx(const Expert* experts, int64_t count, const void* grad, DType grad_dtype, void* dx, void* workspace,
                 const Parallel& parallel) {
  Arena arena(workspace);
  int64_t most_sums = 0;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    most_sums = std::max(most_sums, tile_sums(expert->weight.K, expert->rows));
  }
  float* const sums = arena.take<float>(parallel.threads * most_sums);
  std::deque<GemmDx> products;
  for (const Expert* expert = experts; expert != experts + count; ++expert) {
    const Weight& weight = expert->weight;
    products.emplace_back(weight, offset(grad, grad_dtype, expert->first_row * weight.N), grad_dtype, expert->rows,
                          offset(dx, grad_dtype, expert->first_row * weight.in_features), arena, sums, most_sums);
    products.back().divide(static_cast<int32_t>(ceil_div(parallel.threads, count)));
  }
  const auto product = [&](int64_t i) -> const GemmDx& { return products[static_cast<size_t>(i)]; };

  const Schedule loading(count, [&](int64_t i) { return product(i).rows(); });
  for_each(parallel, loading.tasks(), [&](int64_t task) {
    loading.each(task, task + 1, [&](int64_t i, int64_t m, int64_t) { product(i).load(m); });
  });
  const Schedule schedule(count, [&](int64_t i) { return product(i).tasks(); });
  for_each(parallel, schedule.tasks(), [&](int64_t task, int32_t worker) {
    schedule.each(task, task + 1, [&](int64_t i, int64_t own, int64_t) { product(i).run(own, worker); });
  });
}

}  // namespace exllama::cpu
