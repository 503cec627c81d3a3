// The table for AMX (TILE, INT8) beside AVX-512 VNNI: products of 16 rows of x by 16 columns by 64 rows of W at once.
//
// AMX multiplies bytes. An int16 x is two of them, x = 256 * high + low, so its product is two. Their sum is the same
// integer as any other ISA's, and therefore the same result. "Tile" in this file is Intel's word for a register of AMX.
#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include "cpu/isa/avx512/vocabulary-inl.h"
#include "cpu/isa/x86_features.h"

namespace exllama::cpu {
namespace {

// Palette 1 of LDTILECFG: rows and bytes per row of the eight tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 x, 6 and 7 the panel. The compiler does not know these registers, so they are named by
// hand, and "memory" keeps their loads and stores where they stand.
constexpr int kTileRows = 16;

template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// sum += x (signed, or unsigned bytes) times the panel (signed bytes).
template <int sum, int x, int panel>
inline void add_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(panel));
}
template <int sum, int x, int panel>
inline void add_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(panel));
}

void start(int step) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool sums = tile < 4, panel = tile >= 6;
    config.row_bytes[tile] = static_cast<uint16_t>(sums || panel ? kStrip * 4 : step);
    config.rows[tile] = static_cast<uint8_t>(panel ? step / 4 : kTileRows);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void stop() { asm volatile("tilerelease" ::); }

// 16 rows of sums times two strips, from where the tiles were stored, into acc.
template <bool two_bytes>
EXLLAMA_VECTOR void finish(const MultiplyBytes& args, const int32_t (*sums)[kTileRows][kStrip], int row, int strip) {
  const int rows = args.rows - row < kTileRows ? args.rows - row : kTileRows;
  float* acc = args.acc + row * kPanelColumns + kStrip * strip;
  const Float scale[2] = {load_floats(args.scales + kStrip * strip), load_floats(args.scales + kStrip * (strip + 1))};
  for (int m = 0; m < rows; ++m, acc += kPanelColumns) {
    const SpanScale& x = args.x_scales[row + m];
    const Float x_scale = set_float(x.scale[args.limb]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Int dot = load_int(sums[v][m]);
      if (two_bytes) dot = add_int32(shift_left(dot, 8), load_int(sums[2 + v][m]));
      if (args.zeros) {
        const Int zero = load_int(args.zeros + kStrip * (strip + v));
        dot = sub_int32(dot, multiply_int32(zero, set_int(x.sum[args.limb])));
      }
      float* out = acc + kStrip * v;
      store_floats(out, fma(multiply(to_float(dot), x_scale), scale[v], load_floats(out)));
    }
  }
}

template <bool two_bytes>
void multiply_of(const MultiplyBytes& args, Ahead& ahead) {
  alignas(64) int32_t sums[4][kTileRows][kStrip];
  constexpr int64_t kQuadBytes = 4 * kPanelColumns;
  const int64_t low = args.x_stride / 2;
  // Few rows are one tile high: then each pair of strips takes a share of what is ahead, else each 16 rows.
  const bool one_high = args.rows <= kTileRows;
  int shares = one_high ? (args.columns + 2 * kStrip - 1) / (2 * kStrip) : (args.rows + kTileRows - 1) / kTileRows;
  for (int row = 0; row < args.rows; row += kTileRows) {
    const int8_t* x = args.x + row * args.x_stride;
    for (int strip = 0; strip * kStrip < args.columns; strip += 2) {
      if (strip == 0 || one_high) ahead.prefetch(shares--);
      const int8_t* panel = args.panel + 4 * kStrip * strip;
      clear_tile<0>();
      clear_tile<1>();
      if (two_bytes) {
        clear_tile<2>();
        clear_tile<3>();
      }
      for (int k = 0; k < args.depth; k += args.step) {
        load_tile<4>(x + k, args.x_stride);
        load_tile<6>(panel + k / 4 * kQuadBytes, kQuadBytes);
        load_tile<7>(panel + k / 4 * kQuadBytes + 4 * kStrip, kQuadBytes);
        add_signed<0, 4, 6>();
        add_signed<1, 4, 7>();
        if (two_bytes) {
          load_tile<5>(x + low + k, args.x_stride);
          add_unsigned<2, 5, 6>();
          add_unsigned<3, 5, 7>();
        }
      }
      store_tile<0>(sums[0], sizeof sums[0][0]);
      store_tile<1>(sums[1], sizeof sums[0][0]);
      if (two_bytes) {
        store_tile<2>(sums[2], sizeof sums[0][0]);
        store_tile<3>(sums[3], sizeof sums[0][0]);
      }
      finish<two_bytes>(args, sums, row, strip);
    }
  }
}

void multiply(const MultiplyBytes& args, Ahead& ahead) {
  if (args.two_bytes) {
    multiply_of<true>(args, ahead);
  } else {
    multiply_of<false>(args, ahead);
  }
}

constexpr MatrixUnit kMatrixUnit = [] {
  MatrixUnit unit;
  unit.rows = kTileRows;
  unit.most_step = 64;
  unit.start = start;
  unit.stop = stop;
  unit.multiply = multiply;
  return unit;
}();

}  // namespace

// Few rows, and groups that do not fill words, are served as for VNNI.
const Kernels& amx::kernels() {
  static const Kernels table = [] {
    Kernels made = avx512::vnni_kernels();
    made.name = "amx";
    made.available = x86::has_amx_int8;
    made.matrix_unit = &kMatrixUnit;
    return made;
  }();
  return table;
}

}  // namespace exllama::cpu

#endif
