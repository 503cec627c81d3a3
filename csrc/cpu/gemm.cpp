// out = x @ W of each part: x is packed block by block, then tasks of columns of a part walk down the blocks.
//
// Integer classes (high, medium): a block of a row of x becomes one or two limbs with power-of-two scales, see
// Kernels::quantize; a block with NaN or inf is multiplied as float. The float class (highest, and raw g_idx with any
// precision) takes x as it is. What happens to one row and block depends on that row and block alone, and blocks are
// added in ascending order, so that the result of a row does not depend on M or on the threads.
#include <numeric>

#include "ahead.h"
#include "blocks.h"
#include "convert.h"
#include "exact.h"
#include "kernels.h"
#include "unpack.h"

namespace exllama::cpu {
namespace {

// A task is at most kChunkRows rows of x by kTaskPanels panels, which go through one block before the next: so rows of
// words are read in runs of 2 KiB. Its sums, 512 KiB at most, and its rows of x in one block, 64 KiB, stay in L2.
constexpr int kChunkRows = 256, kTaskPanels = 8;
// Below this many entries of x, packing takes less time than waking threads.
constexpr int64_t kParallelEntries = 1 << 16;

enum class Class { kFloat, kInt16, kInt8 };

Class class_of(const Weight& weight, Precision precision) {
  if (precision == Precision::kHighest || !Blocks::grouped(weight)) return Class::kFloat;
  return precision == Precision::kHigh ? Class::kInt16 : Class::kInt8;
}

// Packed x: entry (block, row) of each array is at block * M + row, and has `stride` values. For tiles the two bytes of
// the int16 limbs lie in their place, as MultiplyTiles has them.
struct PackedX {
  int64_t M;
  int64_t stride;
  int16_t* first = nullptr;
  int16_t* second = nullptr;
  uint8_t* bytes = nullptr;
  float* floats = nullptr;
  BlockScale* scales = nullptr;
};

int64_t task_sums(int64_t N, int64_t M) {
  return std::min<int64_t>(M, kChunkRows) * std::min<int64_t>(round_up(N, kPanelColumns), kTaskPanels * kPanelColumns);
}

struct Scratch {
  PackedX x;
  float* sums;  // [worker][task's sums]
};

// Rows of W in a tile.
int tile_depth(const Weight& weight) {
  return static_cast<int>(std::min<int64_t>(64, round_up(Blocks(weight, kBlockRows).longest(), 4)));
}

// `weight` has the rows that all parts have, and `N` is that of the widest.
Scratch take_scratch(Arena& arena, const Weight& weight, int64_t N, int64_t M, Class kind, int32_t threads) {
  const Blocks blocks(weight, kBlockRows);
  const Tiles* tiles = kernels().tiles;
  PackedX x{M, round_up(blocks.longest(), tiles ? std::max(8, tile_depth(weight)) : 8)};
  // Tiles read on beyond the last row.
  const int64_t entries = blocks.count() * M + (tiles ? tiles->rows : 0);
  if (kind == Class::kFloat) {
    x.floats = arena.take<float>(entries * x.stride);
  } else {
    x.first = arena.take<int16_t>(entries * x.stride);
    if (kind == Class::kInt16) x.second = arena.take<int16_t>(entries * x.stride);
    if (kind == Class::kInt8) x.bytes = arena.take<uint8_t>(entries * x.stride);
    x.scales = arena.take<BlockScale>(entries);
  }
  return {x, arena.take<float>(threads * task_sums(N, M))};
}

// Rows of x that are multiplied alike in one block: limb 0 or 1 of their integers.
struct Run {
  int first;
  int count;
  int limb;
};

struct Runs {
  Run runs[2 * kChunkRows];
  int count = 0;
  bool all_finite = true;

  const Run* begin() const { return runs; }
  const Run* end() const { return runs + count; }
};

// Weights that stand side by side: all but their columns is alike.
struct Parts {
  const Weight* weights;
  int64_t count;

  const Weight* begin() const { return weights; }
  const Weight* end() const { return weights + count; }

  int64_t columns() const {
    return std::accumulate(begin(), end(), int64_t{0}, [](int64_t sum, const Weight& part) { return sum + part.N; });
  }
  int64_t widest() const {
    return std::accumulate(begin(), end(), int64_t{0}, [](int64_t N, const Weight& part) { return std::max(N, part.N); });
  }
  // Ranges of at most `width` columns, each of one part.
  int64_t ranges(int64_t width) const {
    return std::accumulate(begin(), end(), int64_t{0},
                           [&](int64_t sum, const Weight& part) { return sum + ceil_div(part.N, width); });
  }
};

// A range of the columns of one part: in the part, and in the result.
struct Range {
  const Weight& weight;
  int64_t column;
  int64_t width;
  int64_t out_column;
};

Range range_at(const Parts& parts, int64_t index, int64_t width) {
  const Weight* part = parts.begin();
  int64_t before = 0;
  for (; index >= ceil_div(part->N, width); ++part) {
    index -= ceil_div(part->N, width);
    before += part->N;
  }
  const int64_t column = index * width;
  return {*part, column, std::min(width, part->N - column), before + column};
}

class Gemm {
 public:
  Gemm(const Parts& parts, const void* x, DType dtype, int64_t M, void* out, Class kind, void* workspace,
       int32_t threads)
      : parts_(parts),
        columns_(parts.columns()),
        task_sums_(task_sums(parts.widest(), M)),
        format_(*parts.begin()),
        source_(x),
        dtype_(dtype),
        M_(M),
        out_(out),
        kind_(kind),
        isa_(kernels()),
        blocks_(format_, kBlockRows),
        perm_(format_.perm()) {
    Arena arena(workspace);
    const Scratch scratch = take_scratch(arena, format_, parts.widest(), M, kind, threads);
    x_ = scratch.x;
    sums_ = scratch.sums;
    const int values = layout::block_values(format_.bits);
    whole_words_ = format_.shuffled && (format_.group_size % values == 0 || format_.group_size >= format_.K);
    int8_ = kind == Class::kInt8 && isa_.multiply_int8 && whole_words_;
    gemv_ = kind != Class::kFloat && M <= kGemvRows && isa_.gemv && whole_words_;
    tiles_ = kind != Class::kFloat && !gemv_ && whole_words_ ? isa_.tiles : nullptr;
  }

  void run(const Parallel& parallel) {
    const int64_t pack_tasks = M_ * format_.K < kParallelEntries ? 1 : 4 * parallel.threads;
    for_each(parallel, pack_tasks, [&](int64_t task) {
      const int64_t entries = blocks_.count() * M_;
      for (int64_t i = entries * task / pack_tasks; i < entries * (task + 1) / pack_tasks; ++i) {
        pack(i % blocks_.count(), i / blocks_.count());
      }
    });

    if (gemv_) {
      if (all_finite()) return run_gemv(parallel);
      int8_ = false;  // its x is not packed as the int8 panels take it
    }
    // Narrow weights and few rows: smaller tasks, so that each thread has some.
    int64_t chunk = kChunkRows, width = kTaskPanels * kPanelColumns;
    const auto tasks = [&] { return parts_.ranges(width) * ceil_div(M_, chunk); };
    while (width > kPanelColumns && tasks() < 4 * parallel.threads) width /= 2;
    while (chunk > 32 && tasks() < 4 * parallel.threads) chunk /= 2;
    const int64_t ranges = parts_.ranges(width);
    for_each(parallel, tasks(), [&](int64_t task, int32_t worker) {
      const int64_t begin = task / ranges * chunk;
      multiply(begin, static_cast<int>(std::min(chunk, M_ - begin)), range_at(parts_, task % ranges, width),
               sums_ + worker * task_sums_);
    });
  }

 private:
  void run_gemv(const Parallel& parallel) const {
    // Long rows of words, but two tasks for each thread at least.
    int64_t width = kGemvSums / kPanelColumns / M_ * kPanelColumns;
    while (width > kPanelColumns && parallel.threads > 1 && columns_ < 2 * parallel.threads * width) {
      width = width / 2 / kPanelColumns * kPanelColumns;
    }
    for_each(parallel, parts_.ranges(width), [&](int64_t task) { multiply_words(range_at(parts_, task, width)); });
  }

  void pack(int64_t b, int64_t m) {
    const Block block = blocks_[b];
    const int64_t entry = b * M_ + m;
    const void* row = offset(source_, dtype_, m * format_.K);
    if (kind_ == Class::kFloat) {
      isa_.load(row, dtype_, perm_, block.row, block.rows, x_.floats + entry * x_.stride);
      return;
    }
    alignas(64) float values[kBlockRows];
    isa_.load(row, dtype_, perm_, block.row, block.rows, values);
    const int stride = static_cast<int>(x_.stride), limit = kind_ == Class::kInt16 ? 32767 : 127;
    int16_t* first = x_.first + entry * stride;
    int16_t* second = x_.second ? x_.second + entry * stride : nullptr;
    if (tiles_ && kind_ == Class::kInt16) {
      alignas(64) int16_t limb[2][kBlockRows];
      const BlockScale scale = isa_.quantize(values, block.rows, stride, limit, limb[0], limb[1]);
      pack_two_bytes(limb[0], first);
      if (scale.limbs == Limbs::kTwo) pack_two_bytes(limb[1], second);
      x_.scales[entry] = scale;
      return;
    }
    x_.scales[entry] = isa_.quantize(values, block.rows, stride, limit, first, second);
    // int8 panels take unsigned x, the kernels for few rows and for tiles signed.
    const int shift = gemv_ || tiles_ ? 0 : kInt8Offset;
    if (int8_) isa_.pack_bytes(first, stride, format_.bits, 0, shift, x_.bytes + entry * stride);
  }

  void pack_two_bytes(const int16_t* limb, int16_t* out) const {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    const int stride = static_cast<int>(x_.stride);
    isa_.pack_bytes(limb, stride, format_.bits, 8, 0, bytes);
    isa_.pack_bytes(limb, stride, format_.bits, 0, 0, bytes + stride);
  }

  bool all_finite() const {
    const int64_t entries = blocks_.count() * M_;
    return std::all_of(x_.scales, x_.scales + entries, [](const BlockScale& s) { return s.limbs != Limbs::kNone; });
  }

  // All rows of x, straight from the words.
  void multiply_words(const Range& range) const {
    alignas(64) float acc[kGemvSums];
    const int columns = static_cast<int>(range.width), rows = static_cast<int>(M_);
    std::fill(acc, acc + M_ * columns, 0.0f);
    const void* x = int8_ ? static_cast<const void*>(x_.bytes) : x_.first;
    isa_.gemv({&range.weight, rows, x, x_.second, int8_, x_.stride, x_.scales, range.column, columns, acc});
    bool finite = true;
    for (int m = 0; m < rows; ++m) finite &= store(acc + m * columns, columns, m, range.out_column);
    for (int m = 0; !finite && m < rows; ++m) multiply_exactly(m, range, acc + m * columns, kPanelColumns);
  }

  // `rows` rows of x from `begin` on, by a range of columns; the sums of each panel are contiguous.
  void multiply(int64_t begin, int rows, const Range& range, float* acc) const {
    const Weight& weight = range.weight;
    const int64_t panels = ceil_div(range.width, kPanelColumns), panel_sums = rows * kPanelColumns;
    const auto columns = [&](int64_t panel) {
      return static_cast<int>(std::min<int64_t>(kPanelColumns, range.width - panel * kPanelColumns));
    };
    const WordLines lines(weight, kBlockRows, kPanelColumns);
    std::fill(acc, acc + panels * panel_sums, 0.0f);
    if (tiles_) tiles_->start(tile_depth(weight));
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      Runs runs;
      if (kind_ != Class::kFloat) find_runs(b, begin, rows, runs);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t from = range.column + panel * kPanelColumns;
        Ahead ahead = lines_ahead(weight, lines, b + 1, from, columns(panel));
        if (kind_ == Class::kFloat) {
          add_float(weight, b, begin, rows, from, columns(panel), acc + panel * panel_sums, ahead);
        } else {
          add_integer(weight, b, begin, rows, runs, from, columns(panel), acc + panel * panel_sums, ahead);
        }
      }
    }
    if (tiles_) tiles_->stop();
    bool finite = true;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int m = 0; m < rows; ++m) {
        finite &= store(acc + panel * panel_sums + m * kPanelColumns, columns(panel), begin + m,
                        range.out_column + panel * kPanelColumns);
      }
    }
    for (int m = 0; !finite && m < rows; ++m) {
      multiply_exactly(begin + m, range, acc + m * kPanelColumns, panel_sums);
    }
  }

  // Whether all sums are finite.
  bool store(const float* sums, int columns, int64_t m, int64_t out_column) const {
    return isa_.store(sums, columns, out_at(m, out_column), dtype_);
  }

  // Where the sums of row m are not finite; those of one panel are `panel_sums` after those of the last.
  void multiply_exactly(int64_t m, const Range& range, const float* sums, int64_t panel_sums) const {
    const ExactRow row(offset(source_, dtype_, m * format_.K), dtype_, perm_, format_.K);
    for (int64_t n = 0; n < range.width; n += kPanelColumns, sums += panel_sums) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanelColumns, range.width - n));
      row.multiply(range.weight, range.column + n, columns, sums, out_at(m, range.out_column + n));
    }
  }

  void* out_at(int64_t m, int64_t column) const { return offset(out_, dtype_, m * columns_ + column); }

  // The longest runs of rows whose limbs match.
  void find_runs(int64_t b, int64_t begin, int rows, Runs& found) const {
    const BlockScale* scales = x_.scales + b * M_ + begin;
    for (int limb = 0; limb < 2; ++limb) {
      int length = 0;
      for (int m = 0; m < rows; ++m) {
        const Limbs limbs = scales[m].limbs;
        if (limbs == Limbs::kNone) found.all_finite = false;
        const bool takes_part = limbs == Limbs::kTwo || (limbs == Limbs::kOne && limb == 0);
        length = takes_part ? length + 1 : 0;
        if (length == 1) found.runs[found.count++] = {m, 0, limb};
        if (takes_part) ++found.runs[found.count - 1].count;
      }
    }
  }

  // The words of a panel of block b, for prefetching; its zero points and scales are prefetched here.
  Ahead lines_ahead(const Weight& weight, const WordLines& lines, int64_t b, int64_t column, int columns) const {
    if (b >= blocks_.count()) return {};
    const Block block = blocks_[b];
    if (Blocks::grouped(weight)) {
      const int64_t index = block.group * weight.N + column;
      __builtin_prefetch(weight.qzeros + index * weight.bits / 32, 0, 3);
      const char* scales = static_cast<const char*>(offset(weight.scales, weight.scales_dtype, index));
      for (int64_t byte = 0; byte < columns * bytes_of(weight.scales_dtype); byte += 64) {
        __builtin_prefetch(scales + byte, 0, 3);
      }
    }
    return lines.from(words_of(weight, block.row, column));
  }

  void add_float(const Weight& weight, int64_t b, int64_t begin, int rows, int64_t column, int columns, float* acc,
                 Ahead& ahead) const {
    alignas(64) float panel[kBlockRows * kPanelColumns];
    float scales[kPanelColumns];
    const Block block = blocks_[b];
    if (Blocks::grouped(weight)) {
      int32_t zeros[kPanelColumns];
      isa_.load_zeros(weight, block.group, column, columns, zeros);
      isa_.load_scales(weight, block.group, column, columns, scales);
      isa_.unpack_float(weight, block.row, block.rows, column, columns, zeros, nullptr, panel);
    } else {
      unpack_scaled(isa_, weight, block.row, block.rows, 0, column, columns, panel);
      std::fill(scales, scales + kPanelColumns, 1.0f);
    }
    const float* x = x_.floats + (b * M_ + begin) * x_.stride;
    isa_.multiply_float({x, x_.stride, nullptr, 0, rows, block.rows, panel, columns, scales, acc}, ahead);
  }

  void add_integer(const Weight& weight, int64_t b, int64_t begin, int rows, const Runs& runs, int64_t column,
                   int columns, float* acc, Ahead& ahead) const {
    const Block block = blocks_[b];
    const int64_t entry = b * M_ + begin;
    const BlockScale* x_scales = x_.scales + entry;
    alignas(64) int32_t zeros[kPanelColumns];
    alignas(64) float scales[kPanelColumns];
    // With so few rows the tiles are done as soon as the unpacking, which takes a share of what is ahead too.
    if (tiles_ && rows <= tiles_->rows) ahead.prefetch(3);
    isa_.load_zeros(weight, block.group, column, columns, zeros);
    isa_.load_scales(weight, block.group, column, columns, scales);
    if (!runs.all_finite) add_not_finite(weight, block, x_scales, begin, rows, column, columns, zeros, scales, acc);
    if (tiles_ || int8_) {
      alignas(64) int8_t panel[kBlockRows * kPanelColumns];
      alignas(64) int32_t start[kPanelColumns];
      isa_.unpack_int8(weight, block.row, block.rows, column, columns, zeros, panel, start);
      const bool whole_zero = weight.bits != 8;
      if (!whole_zero) std::for_each(zeros, zeros + kPanelColumns, [](int32_t& zero) { zero -= kInt8Offset; });
      for (const Run& run : runs) {
        if (tiles_) {
          const bool two_bytes = kind_ == Class::kInt16;
          const int64_t x_stride = two_bytes ? 2 * x_.stride : x_.stride;
          const void* x = !two_bytes ? x_.bytes : static_cast<const void*>(run.limb == 0 ? x_.first : x_.second);
          tiles_->multiply({static_cast<const int8_t*>(x) + (entry + run.first) * x_stride, x_stride,
                            x_scales + run.first, run.limb, two_bytes, run.count, block.rows, tile_depth(weight),
                            panel, columns, scales, whole_zero ? nullptr : zeros, acc + run.first * kPanelColumns},
                           ahead);
          continue;
        }
        isa_.multiply_int8({x_.bytes + (entry + run.first) * x_.stride, x_.stride, x_scales + run.first, 0,
                            run.count, block.rows, panel, columns, scales, acc + run.first * kPanelColumns, start,
                            whole_zero ? nullptr : zeros},
                           ahead);
      }
      return;
    }
    alignas(64) int16_t panel[kBlockRows * kPanelColumns];
    isa_.unpack_int16(weight, block.row, block.rows, column, columns, zeros, panel);
    for (const Run& run : runs) {
      const int16_t* x = run.limb == 0 ? x_.first : x_.second;
      isa_.multiply_int16({x + (entry + run.first) * x_.stride, x_.stride, x_scales + run.first, run.limb,
                           run.count, block.rows, panel, columns, scales, acc + run.first * kPanelColumns},
                          ahead);
    }
  }

  // The rows whose x has NaN or inf in this block, in float arithmetic.
  void add_not_finite(const Weight& weight, const Block& block, const BlockScale* x_scales, int64_t begin, int rows,
                      int64_t column, int columns, const int32_t* zeros, const float* scales, float* acc) const {
    alignas(64) float panel[kBlockRows * kPanelColumns];
    alignas(64) float x[kBlockRows];
    isa_.unpack_float(weight, block.row, block.rows, column, columns, zeros, nullptr, panel);
    for (int m = 0; m < rows; ++m) {
      if (x_scales[m].limbs != Limbs::kNone) continue;
      isa_.load(offset(source_, dtype_, (begin + m) * weight.K), dtype_, perm_, block.row, block.rows, x);
      Ahead nothing{};
      isa_.multiply_float({x, kBlockRows, nullptr, 0, 1, block.rows, panel, columns, scales, acc + m * kPanelColumns},
                          nothing);
    }
  }

  const Parts parts_;
  const int64_t columns_;
  const int64_t task_sums_;
  const Weight& format_;  // what the parts have in common
  const void* source_;
  DType dtype_;
  int64_t M_;
  void* out_;
  Class kind_;
  const Kernels& isa_;
  Blocks blocks_;
  const int32_t* perm_;
  PackedX x_;
  float* sums_;
  bool whole_words_;
  bool int8_;
  bool gemv_;
  const Tiles* tiles_;
};

}  // namespace

size_t gemm_workspace_bytes(const Weight* parts, int64_t count, int64_t M, DType, Precision precision,
                            int32_t threads) {
  Arena arena(nullptr);
  take_scratch(arena, *parts, Parts{parts, count}.widest(), M, class_of(*parts, precision), threads);
  return arena.bytes();
}

void gemm(const Weight* parts, int64_t count, const void* x, DType x_dtype, int64_t M, void* out, Precision precision,
          void* workspace, const Parallel& parallel) {
  if (M == 0) return;
  Gemm({parts, count}, x, x_dtype, M, out, class_of(*parts, precision), workspace, parallel.threads).run(parallel);
}

}  // namespace exllama::cpu
