// Products of signed bytes by an int8 panel, over the vocabulary: what the units of dotprod and i8mm share.
//
// An int16 x is two bytes, x = 256 * high + low + 128 with both of them signed. The dot of 128 with a column of the panel
// is -start of that column.
#pragma once

#include "cpu/kernels.h"

namespace exllama::cpu {
namespace {

// Strips of the panel whose sums stay in registers together.
constexpr int kUnitStrips = 2;
// Rows of x, at most, of sums that stay in registers together. Each byte of x has its own: 16 sums for either.
template <bool two_bytes>
constexpr int kUnitRows = two_bytes ? 4 : 8;

// acc of one row and one strip, from its sum, or from those of its high and low bytes.
template <bool two_bytes>
EXLLAMA_VECTOR_INLINE void finish(const MultiplyBytes& args, int row, int column, Int sum, Int low) {
  if (two_bytes) sum = sub_int32(add_int32(shift_left(sum, 8), low), load_int(args.start + column));
  const SpanScale& x = args.x_scales[row];
  if (args.zeros) sum = sub_int32(sum, multiply_int32(load_int(args.zeros + column), set_int(x.sum[args.limb])));
  float* acc = args.acc + row * kPanelColumns + column;
  const Float value = multiply(to_float(sum), set_float(x.scale[args.limb]));
  store_floats(acc, fma(value, load_floats(args.scales + column), load_floats(acc)));
}

// Tile::add<two_bytes, mr>(args, row, strip) multiplies mr rows by kUnitStrips strips.
template <typename Tile, bool two_bytes, int mr>
void add_tiles(const MultiplyBytes& args, int row) {
  for (int strip = 0; strip * kStrip < args.columns; strip += kUnitStrips) {
    Tile::template add<two_bytes, mr>(args, row, strip);
  }
}

// The rows from `row` on, at most mr.
template <typename Tile, bool two_bytes, int mr>
void add_last_tiles(const MultiplyBytes& args, int row) {
  if (args.rows - row == mr) return add_tiles<Tile, two_bytes, mr>(args, row);
  if constexpr (mr > 1) add_last_tiles<Tile, two_bytes, mr - 1>(args, row);
}

template <typename Tile, bool two_bytes>
void multiply_bytes_of(const MultiplyBytes& args, Ahead& ahead) {
  constexpr int mr = kUnitRows<two_bytes>;
  int row = 0, shares = (args.rows + mr - 1) / mr;
  for (; args.rows - row >= mr; row += mr) {
    ahead.prefetch(shares--);
    add_tiles<Tile, two_bytes, mr>(args, row);
  }
  if (row == args.rows) return;
  ahead.prefetch(1);
  add_last_tiles<Tile, two_bytes, mr - 1>(args, row);
}

template <typename Tile>
void multiply_bytes(const MultiplyBytes& args, Ahead& ahead) {
  if (args.two_bytes) return multiply_bytes_of<Tile, true>(args, ahead);
  multiply_bytes_of<Tile, false>(args, ahead);
}

template <typename Tile>
constexpr MatrixUnit unit_of() {
  MatrixUnit unit;
  unit.rows = Tile::kRows;
  unit.most_step = 8;
  unit.low_offset = -kInt8Offset;
  unit.start = [](int) {};
  unit.stop = [] {};
  unit.multiply = multiply_bytes<Tile>;
  return unit;
}

}  // namespace
}  // namespace exllama::cpu
