// dx = grad @ W^T in float32, with the scales inside the sum over columns.
//
// The panels are transposed, so that this is a product like gemm's. A tile is some rows of grad by some rows of W, in
// panels of kPanelColumns of them. It walks the columns of W in chunks, whose sums are added in ascending order.
#include <algorithm>
#include <cmath>

#include "cpu/ahead.h"
#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/gemm/exact.h"
#include "cpu/gemm/partition.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace exllama::cpu {
namespace {

// Columns of W in a chunk, the depth of a product: two unpackings.
constexpr int kDepth = 2 * kPanelColumns;

struct Scratch {
  float* grad;  // [chunk of columns][row][kDepth]
  float* sums;  // [worker][sums of a tile]
};

Scratch take_scratch(Arena& arena, const Weight& weight, int64_t M, int32_t threads) {
  return {arena.take<float>(ceil_div(weight.N, kDepth) * M * kDepth),
          arena.take<float>(threads * tile_sums(weight.K, M))};
}

class GemmDx {
 public:
  GemmDx(const Weight& weight, const void* grad, DType dtype, int64_t M, void* dx, const Scratch& scratch)
      : weight_(weight), source_(grad), dtype_(dtype), M_(M), dx_(dx), grad_(scratch.grad), sums_(scratch.sums) {}

  void run(const Parallel& parallel) const {
    for_each(parallel, M_, [&](int64_t m) {
      for (int64_t c = 0; c < chunks(); ++c) {
        const void* row = offset(source_, dtype_, m * weight_.N);
        isa_.load(row, dtype_, nullptr, c * kDepth, depth(c), grad_ + (c * M_ + m) * kDepth);
      }
    });
    const Partition partition(M_, parallel.threads, [&](int64_t width) { return ceil_div(weight_.K, width); });
    for_each(parallel, partition.tiles(), [&](int64_t task, int32_t worker) {
      const Tile tile = partition[task];
      const int64_t row = tile.range * partition.width();
      multiply(tile.row, tile.rows, row, std::min(partition.width(), weight_.K - row),
               sums_ + worker * tile_sums(weight_.K, M_));
    });
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
  const Kernels& isa_ = kernels();
};

}  // namespace

size_t gemm_dx_workspace_bytes(const Weight& weight, int64_t M, int32_t threads) {
  Arena arena(nullptr);
  take_scratch(arena, weight, M, threads);
  return arena.bytes();
}

void gemm_dx(const Weight& weight, const void* grad, DType grad_dtype, int64_t M, void* dx, void* workspace,
             const Parallel& parallel) {
  Arena arena(workspace);
  GemmDx(weight, grad, grad_dtype, M, dx, take_scratch(arena, weight, M, parallel.threads)).run(parallel);
}

}  // namespace exllama::cpu
