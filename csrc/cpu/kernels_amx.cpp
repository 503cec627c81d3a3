// The kernels for AMX (TILE, INT8) beside AVX-512 VNNI: products of 16 rows of x by 16 columns by 64 rows of W at once.
//
// A tile multiplies bytes, and an int16 x is two of them, x = 256 * high + low, so its product is two: the same integer
// as any other ISA's, and therefore the same result.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx512.h"

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

// Tiles 0 to 3 hold sums, 4 and 5 x, 6 and 7 the panel. The compiler knows no tile registers: they are named by hand,
// and "memory" keeps loads and stores of tiles where they stand.
constexpr int kTileRows = 16;

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// sum += x (signed, or unsigned bytes) times the panel (signed bytes).
template <int kSum, int kX, int kPanel>
inline void add_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kPanel));
}
template <int kSum, int kX, int kPanel>
inline void add_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kPanel));
}

void start(int tile_depth) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool sums = tile < 4, panel = tile >= 6;
    config.row_bytes[tile] = static_cast<uint16_t>(sums || panel ? kStrip * 4 : tile_depth);
    config.rows[tile] = static_cast<uint8_t>(panel ? tile_depth / 4 : kTileRows);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void stop() { asm volatile("tilerelease" ::); }

// 16 rows of sums times two strips, from where the tiles were stored, into acc.
template <bool kTwoBytes>
EXLLAMA_VECTOR void finish(const MultiplyTiles& args, const int32_t (*sums)[kTileRows][kStrip], int row, int strip) {
  const int rows = args.rows - row < kTileRows ? args.rows - row : kTileRows;
  float* acc = args.acc + row * kPanelColumns + kStrip * strip;
  const Float scale[2] = {load_floats(args.scales + kStrip * strip), load_floats(args.scales + kStrip * (strip + 1))};
  for (int m = 0; m < rows; ++m, acc += kPanelColumns) {
    const BlockScale& x = args.x_scales[row + m];
    const Float x_scale = set_float(x.scale[args.limb]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Int dot = load_int(sums[v][m]);
      if (kTwoBytes) dot = _mm512_add_epi32(shift_left(dot, 8), load_int(sums[2 + v][m]));
      if (args.zeros) {
        const Int zero = load_int(args.zeros + kStrip * (strip + v));
        dot = sub_int32(dot, multiply_int32(zero, set_int(x.sum[args.limb])));
      }
      float* out = acc + kStrip * v;
      store_floats(out, fma(multiply(to_float(dot), x_scale), scale[v], load_floats(out)));
    }
  }
}

template <bool kTwoBytes>
void multiply_of(const MultiplyTiles& args, Ahead& ahead) {
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
      if (kTwoBytes) {
        clear_tile<2>();
        clear_tile<3>();
      }
      for (int k = 0; k < args.depth; k += args.tile_depth) {
        load_tile<4>(x + k, args.x_stride);
        load_tile<6>(panel + k / 4 * kQuadBytes, kQuadBytes);
        load_tile<7>(panel + k / 4 * kQuadBytes + 4 * kStrip, kQuadBytes);
        add_signed<0, 4, 6>();
        add_signed<1, 4, 7>();
        if (kTwoBytes) {
          load_tile<5>(x + low + k, args.x_stride);
          add_unsigned<2, 5, 6>();
          add_unsigned<3, 5, 7>();
        }
      }
      store_tile<0>(sums[0], sizeof sums[0][0]);
      store_tile<1>(sums[1], sizeof sums[0][0]);
      if (kTwoBytes) {
        store_tile<2>(sums[2], sizeof sums[0][0]);
        store_tile<3>(sums[3], sizeof sums[0][0]);
      }
      finish<kTwoBytes>(args, sums, row, strip);
    }
  }
}

void multiply(const MultiplyTiles& args, Ahead& ahead) {
  if (args.two_bytes) {
    multiply_of<true>(args, ahead);
  } else {
    multiply_of<false>(args, ahead);
  }
}

}  // namespace

const Tiles kAmxTiles = {kTileRows, start, stop, multiply};

}  // namespace exllama::cpu

#endif
