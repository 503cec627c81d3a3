// The table for NEON with dotprod: sdot adds four products of signed bytes to each lane.
#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#include "cpu/isa/neon/targets.h"

#define EXLLAMA_VECTOR EXLLAMA_NEON_DOTPROD
#define EXLLAMA_HAS_DOTPROD 1
#include "cpu/isa/neon/vocabulary-inl.h"

#include "cpu/generic/table-inl.h"
#include "cpu/isa/arm_features.h"
#include "cpu/isa/neon/float_words.h"
#include "cpu/isa/neon/gemv.h"
#include "cpu/isa/neon/unit-inl.h"

namespace exllama::cpu {
namespace {

struct DotTile {
  static constexpr int kRows = 1;

  template <int lane>
  static EXLLAMA_VECTOR_INLINE void add_products(Int& sum, Int weight, Int x) {
    asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(weight), "w"(x), "i"(lane));
  }

  // sums += rows [4 * lane, 4 * lane + 4) of x, of which 16 are loaded.
  template <int vectors, int lane>
  static EXLLAMA_VECTOR_INLINE void add_quad(Int (*sum)[kUnitStrips], const Int* x, const int8_t* panel) {
    Int weight[kUnitStrips];
#pragma GCC unroll 2
    for (int v = 0; v < kUnitStrips; ++v) weight[v] = load_int(panel + lane * 4 * kPanelColumns + 4 * kStrip * v);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kUnitStrips; ++v) add_products<lane>(sum[i][v], weight[v], x[i]);
    }
  }

  template <bool two_bytes, int mr>
  static EXLLAMA_VECTOR void add(const MultiplyBytes& args, int row, int strip) {
    constexpr int kBytes = two_bytes ? 2 : 1, kVectors = mr * kBytes;
    const int64_t stride = args.x_stride / kBytes;
    const int8_t* x = args.x + row * args.x_stride;
    const int8_t* panel = args.panel + 4 * kStrip * strip;
    Int sum[kVectors][kUnitStrips];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i][0] = sum[i][1] = set_int(0);
    int k = 0;
    for (; k + 16 <= args.depth; k += 16, panel += 16 * kPanelColumns) {
      Int loaded[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) loaded[i] = load_int(x + i * stride + k);
      add_quad<kVectors, 0>(sum, loaded, panel);
      add_quad<kVectors, 1>(sum, loaded, panel);
      add_quad<kVectors, 2>(sum, loaded, panel);
      add_quad<kVectors, 3>(sum, loaded, panel);
    }
    for (; k < args.depth; k += 4, panel += 4 * kPanelColumns) {
      Int loaded[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) loaded[i] = broadcast(x + i * stride + k);
      add_quad<kVectors, 0>(sum, loaded, panel);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kUnitStrips; ++v) {
#pragma GCC unroll 8
      for (int m = 0; m < mr; ++m) {
        finish<two_bytes>(args, row + m, kStrip * (strip + v), sum[m * kBytes][v], sum[m * kBytes + kBytes - 1][v]);
      }
    }
  }
};

constexpr MatrixUnit kUnit = unit_of<DotTile>();

}  // namespace

const Kernels& neon::dotprod_kernels() {
  static const Kernels table = [] {
    Kernels made = vector_kernels<true>();
    made.name = "neon_dotprod";
    made.available = arm::has_dotprod;
    made.multiply_int8 = nullptr;  // the unit does
    made.matrix_unit = &kUnit;
    made.gemv = neon::dotprod_gemv;
    made.gemv_takes_bytes = true;
    made.gemv_float = neon::gemv_float;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
