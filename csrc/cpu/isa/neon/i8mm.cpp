// The table for NEON with dotprod and i8mm: smmla multiplies two rows of eight bytes by two columns of eight.
#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#include "cpu/isa/neon/targets.h"

#define EXLLAMA_VECTOR EXLLAMA_NEON_I8MM
#define EXLLAMA_HAS_DOTPROD 1
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/words-inl.h"
#include "cpu/isa/arm_features.h"
#include "cpu/isa/neon/unit-inl.h"

namespace exllama::cpu {
namespace {

EXLLAMA_VECTOR_INLINE Int low_halves(Int a, Int b) {
  return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
EXLLAMA_VECTOR_INLINE Int high_halves(Int a, Int b) {
  return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// sum, as [row][column], += two rows of eight bytes times two columns of eight.
EXLLAMA_VECTOR_INLINE void add_products(Int& sum, Int rows, Int columns) {
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(rows), "w"(columns));
}

struct MatrixTile {
  static constexpr int kRows = 2;

  // Sums of two rows by two columns, [row][column], for each pair of vectors of x and each half of a strip. `x` has eight
  // bytes of two rows, `first` and `second` four rows each of a strip of the panel.
  template <int pairs>
  static EXLLAMA_VECTOR_INLINE void add_strip(Int (*sum)[2], const Int* x, Int first, Int second) {
    const Int left = vzip1q_s32(first, second), right = vzip2q_s32(first, second);
#pragma GCC unroll 4
    for (int i = 0; i < pairs; ++i) {
      add_products(sum[i][0], x[i], left);
      add_products(sum[i][1], x[i], right);
    }
  }

  // Pair i of the bytes of rows is byte i % kBytes of the rows 2 * (i / kBytes) and the next one.
  template <bool two_bytes, int mr>
  static EXLLAMA_VECTOR void add(const MultiplyBytes& args, int row, int strip) {
    constexpr int kBytes = two_bytes ? 2 : 1, kPairs = (mr + 1) / 2 * kBytes;
    const int64_t low = args.x_stride / 2;
    const int8_t* panel = args.panel + 4 * kStrip * strip;
    const int8_t* base[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) base[i] = args.x + (row + i / kBytes * 2) * args.x_stride + i % kBytes * low;
    Int sum[kUnitStrips][kPairs][2];
#pragma GCC unroll 2
    for (int v = 0; v < kUnitStrips; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) sum[v][i][0] = sum[v][i][1] = set_int(0);
    }
    int k = 0;
    for (; k + 16 <= args.depth; k += 16, panel += 16 * kPanelColumns) {
      Int x[2][kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        const Int even = load_int(base[i] + k), odd = load_int(base[i] + args.x_stride + k);
        x[0][i] = low_halves(even, odd);
        x[1][i] = high_halves(even, odd);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
        for (int v = 0; v < kUnitStrips; ++v) {
          const int8_t* quads = panel + half * 8 * kPanelColumns + 4 * kStrip * v;
          add_strip<kPairs>(sum[v], x[half], load_int(quads), load_int(quads + 4 * kPanelColumns));
        }
      }
    }
    // Four rows at a time, with zeros for the next four.
    for (; k < args.depth; k += 4, panel += 4 * kPanelColumns) {
      Int x[kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        x[i] = low_halves(broadcast(base[i] + k), broadcast(base[i] + args.x_stride + k));
      }
#pragma GCC unroll 2
      for (int v = 0; v < kUnitStrips; ++v) add_strip<kPairs>(sum[v], x, load_int(panel + 4 * kStrip * v), set_int(0));
    }
#pragma GCC unroll 2
    for (int v = 0; v < kUnitStrips; ++v) {
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        const int pair = m / 2 * kBytes;
        finish<two_bytes>(args, row + m, kStrip * (strip + v), row_of(sum[v][pair], m % 2),
                          row_of(sum[v][pair + kBytes - 1], m % 2));
      }
    }
  }

  static EXLLAMA_VECTOR_INLINE Int row_of(const Int* sum, int row) {
    return row == 0 ? low_halves(sum[0], sum[1]) : high_halves(sum[0], sum[1]);
  }
};

constexpr MatrixUnit kUnit = unit_of<MatrixTile>();

}  // namespace

// All but products of many rows is served as for dotprod.
const Kernels& neon::i8mm_kernels() {
  static const Kernels table = [] {
    Kernels made = neon::dotprod_kernels();
    made.name = "neon_i8mm";
    made.available = arm::has_i8mm;
    made.matrix_unit = &kUnit;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
