// What each instruction set implements: one table of functions per ISA, and the layouts that they share.
//
// A *span* is a run of at most kSpanRows rows of one group. A *panel* is a span by kPanelColumns columns, unpacked. What
// a panel holds in columns beyond N is never used.
//
//   int16 panel  q - z as [row / 2][column][row % 2]: a 32-bit lane has the two rows that one 16-bit dot product takes
//   int8 panel   what Int8Panels says, as [row / 4][column][row % 4], the rows of a block in quad_order
//   float panel  q - z or scale * (q - z) as [row][column]
//   word panel   the words as they are, as [row of words][column]
//
// gemm_dx sums over columns, so its panels are transposed: scale * (q - z) as [column][row], kPanelColumns rows wide.
//
// All sums of integers are exact. All float operations on one element are the same ones in the same order. So every ISA
// gives the same bits.
//
// An ISA is a folder of isa/. Vector ISAs have a vocabulary there, over which generic/ writes the kernels once.
#pragma once

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/cpu.h"
#include "cpu/spans.h"
#include "layout/formats.h"

namespace exllama::cpu {

// 128 rows of 8-bit weights times int16 sum to at most 128 * 256 * 32767 < 2^30: int32 holds every span.
constexpr int kSpanRows = 128;

// An int16 panel of 128 x 64 is 16 KiB and shares L1 (32 KiB or more) with the rows of x.
constexpr int kPanelColumns = 64;

// Up to this many rows of x are multiplied straight from the words.
constexpr int kGemvRows = 8;
// The most sums of such a task. They stay in L2, and rows of words are read in runs of 8 KiB for 8 rows of x.
constexpr int kGemvSums = 16384;
// Up to this many, the words of a panel are unpacked in registers where the ISA can. With more a panel in memory is as
// fast. On Zen 4, int16 by words and by panels reaches 90 and 87% of the peak at 64 rows, 86 and 89% at 256.
constexpr int kWordRows = 64;

// Up to this many rows of x are multiplied as floats by panels of words. A Zen 4 takes 5 to 15% less time so than with
// panels of floats, 2% less for 32 rows, and 6% more for 256.
constexpr int kFloatWordsRows = 24;

// A span of a row of x as integers: x = scale[0] * limb 0 + scale[1] * limb 1.
enum class Limbs : uint8_t { kNone = 0, kOne = 1, kTwo = 2 };  // kNone: x has NaN or inf and is multiplied as float

struct SpanScale {
  float scale[2];
  int32_t sum[2];  // of each limb
  Limbs limbs;
};

// acc (rows, kPanelColumns) += x (rows, depth) @ panel (depth, columns):
//   integers: acc = fma(float(dot) * x_scale[row], scales[column], acc)
//   float:    acc = fma(sum of fma over ascending rows of the panel, scales[column], acc)
template <typename X, typename Panel>
struct Multiply {
  const X* x = nullptr;
  int64_t x_stride = 0;
  const SpanScale* x_scales = nullptr;  // one per row, null for float
  int limb = 0;
  int rows = 0;
  int depth = 0;  // rows of the panel
  const Panel* panel = nullptr;
  int columns = 0;
  const float* scales = nullptr;  // [kPanelColumns]
  float* acc = nullptr;
  // For int8 panels: where the dot of each column begins, and the part of its zero point that is not in the panel, or
  // null. For word panels: the zero points.
  const int32_t* start = nullptr;
  const int32_t* zeros = nullptr;
};

// What int8 panels hold. A dot product of bytes takes unsigned with signed.
enum class Int8Panels : uint8_t {
  kNone,      // int8 values go through the int16 panel
  kCentered,  // signed q - z, or q - 128 of 8 bits, times unsigned x + kInt8Offset
  kPlain,     // unsigned q times signed x
};

constexpr int kInt8Offset = 128;

// Products of plain panels are added in int16, which 8 bits would overflow: generic/short_int8-inl.h.
constexpr bool has_int8_panel(Int8Panels panels, int bits) {
  return panels == Int8Panels::kCentered || (panels == Int8Panels::kPlain && bits <= 4);
}

// A few rows of x times a range of columns, straight from the words of a shuffled weight whose groups fill whole words.
struct Gemv {
  const Weight* weight = nullptr;
  int rows = 0;  // at most kGemvRows
  // x of span s and row m, at (s * rows + m) * x_stride: floats, or limb 0 as int16, whole or as two bytes, or as int8
  // in quad_order.
  const void* x = nullptr;
  const int16_t* x_second = nullptr;  // with int16
  bool int8 = false;
  int64_t x_stride = 0;
  const SpanScale* x_scales = nullptr;  // [s * rows + m]; null for floats, and none has Limbs::kNone
  int64_t column = 0;
  int columns = 0;
  // [rows][columns rounded up to kPanelColumns], at most kGemvSums, all zero.
  float* acc = nullptr;
};

// acc += x @ W like Multiply, straight from the words of a shuffled weight whose groups fill whole words.
struct MultiplyWords {
  const Weight* weight = nullptr;
  int64_t row = 0;  // of the weight, the first
  int depth = 0;    // rows of the weight
  int64_t column = 0;
  int columns = 0;          // at most kPanelColumns
  const void* x = nullptr;  // int16, or signed int8 in quad_order
  bool int8 = false;
  int64_t x_stride = 0;  // in bytes
  const SpanScale* x_scales = nullptr;
  int limb = 0;
  int rows = 0;
  const int32_t* zeros = nullptr;  // [kPanelColumns], as scales
  const float* scales = nullptr;
  float* acc = nullptr;
};

// acc += x @ panel like Multiply, by a matrix unit. x is signed bytes in quad_order. For two_bytes it is x_stride / 2
// signed high bytes and as many low ones, plus MatrixUnit::low_offset. Rows up to a multiple of MatrixUnit::rows may be
// read, and their sums are lost.
struct MultiplyBytes {
  const int8_t* x = nullptr;
  int64_t x_stride = 0;
  const SpanScale* x_scales = nullptr;
  int limb = 0;
  bool two_bytes = false;
  int rows = 0;
  int depth = 0;
  int step = 0;  // rows of W at once; x and the panel go on, x with zeros, to a multiple of it
  const int8_t* panel = nullptr;
  int columns = 0;
  const float* scales = nullptr;
  const int32_t* start = nullptr;  // of unpack_int8
  const int32_t* zeros = nullptr;
  float* acc = nullptr;
};

// A thread configures the unit before a run of products, and releases it afterwards.
struct MatrixUnit {
  int rows = 0;
  int most_step = 0;
  int low_offset = 0;  // 0 for unsigned low bytes, -kInt8Offset for signed ones
  void (*start)(int step) = nullptr;
  void (*stop)() = nullptr;
  void (*multiply)(const MultiplyBytes& multiply, Ahead& ahead) = nullptr;
};

// The table of an ISA. Where it leaves a field null, the result comes by another way and is the same.
struct Kernels {
  const char* name = nullptr;
  // Whether this CPU has the ISA.
  bool (*available)() = nullptr;

  // out[i] = x[perm ? perm[i] : i] in float32, for `count` entries from `begin` on. x[-1] is 0.
  void (*load)(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) = nullptr;
  // Returns whether all values are finite.
  bool (*store)(const float* values, int count, void* out, DType dtype) = nullptr;
  // Rounds a span of a row of x, as `load` has it, to limbs of at most `limit`, padded with zeros to `stride` entries, a
  // multiple of 8. The limit is 32767, or 127, for which there is no second limb.
  SpanScale (*quantize)(const void* x, DType dtype, const int32_t* perm, const Span& span, int stride, int limit,
                        int16_t* first, int16_t* second) = nullptr;
  // out[i] = (limb[order of i] >> shift) + offset as a byte, for whole blocks of values in quad_order.
  void (*pack_bytes)(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out) = nullptr;

  // The zero points and scales of one group, zero beyond `columns`.
  void (*load_zeros)(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) = nullptr;
  void (*load_scales)(const Weight& weight, int64_t group, int64_t column, int columns, float* scales) = nullptr;
  void (*unpack_int16)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       int16_t* panel) = nullptr;
  // Without scales where they are null.
  void (*unpack_float)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       const float* scales, float* panel) = nullptr;
  // Rows [row, row + rows) of columns [column, column + columns), at most kPanelColumns of both, all of one group.
  void (*unpack_transposed)(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                            const int32_t* zeros, const float* scales, float* panel) = nullptr;

  void (*multiply_int16)(const Multiply<int16_t, int16_t>& multiply, Ahead& ahead) = nullptr;
  void (*multiply_float)(const Multiply<float, float>& multiply, Ahead& ahead) = nullptr;

  Int8Panels int8_panels = Int8Panels::kNone;
  // start[column] of centered panels is -kInt8Offset * (sum of the panel's column).
  void (*unpack_int8)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                      int8_t* panel, int32_t* start) = nullptr;
  void (*multiply_int8)(const Multiply<uint8_t, int8_t>& multiply, Ahead& ahead) = nullptr;
  // Null where panels serve few rows as well.
  void (*gemv)(const Gemv& gemv) = nullptr;
  bool gemv_int8 = false;  // whether it takes int8
  // Whether it takes the two bytes of an int16 x apart, as MultiplyBytes has them, the low ones unsigned.
  bool gemv_takes_bytes = false;
  void (*gemv_float)(const Gemv& gemv) = nullptr;
  // Null where panels of floats serve few rows as well. `bits` is the width of the words.
  void (*multiply_float_words)(const Multiply<float, uint32_t>& multiply, int bits, Ahead& ahead) = nullptr;
  // Null where panels serve all rows beyond kGemvRows.
  void (*multiply_words)(const MultiplyWords& multiply, Ahead& ahead) = nullptr;
  // Null where there is none.
  const MatrixUnit* matrix_unit = nullptr;
};

// The table of the ISA in use.
const Kernels& kernels();

// Whether rows [row, row + rows) are whole blocks of a shuffled weight, which is what vector code unpacks.
inline bool fills_words(const Weight& weight, int64_t row, int rows) {
  const int values = layout::block_values(weight.bits);
  return weight.shuffled && row % values == 0 && rows % values == 0;
}

// Where a row of x lies in a quad of bytes of the int8 panel: row quad_order(bits, i) of each block is its i-th byte.
// quad_of in generic/words-inl.h unpacks them so.
//
//   4 bits: w & 0x0f0f0f0f has the rows 0 4 1 5, (w >> 4) & 0x0f0f0f0f the rows 2 6 3 7.
//   2 bits: (w >> 2 i) & 0x03030303 has the rows 2 i, 2 i + 8, 2 i + 1, 2 i + 9.
//   3 bits: two pairs are interleaved, 0 2 1 3.
//   8 bits: rows are as they are.
//
// It is negative for a width that has no order yet: the static_assert below refuses it.
constexpr int quad_order(int bits, int i) {
  const int quad = i / 4, odd = i % 4 / 2, far = i % 2;
  if (bits == 4) return 2 * quad + odd + 4 * far;
  if (bits == 2) return 2 * quad + odd + 8 * far;
  if (bits == 3) return 4 * quad + odd + 2 * far;
  if (bits == 8) return i;
  return -1;
}

constexpr bool all_widths_have_a_quad_order() {
  for (const int bits : layout::kWidths) {
    if (quad_order(bits, 0) < 0) return false;
  }
  return true;
}
static_assert(all_widths_have_a_quad_order(),
              "csrc/cpu has no order of quads of a width in kWidths: add it to quad_order in kernels.h");

// The words of the block of values that row k begins or lies in.
inline const uint32_t* words_of(const Weight& weight, int64_t k, int64_t column) {
  const int64_t block = k / layout::block_values(weight.bits);
  return weight.qweight + block * layout::block_words(weight.bits) * weight.N + column;
}

}  // namespace exllama::cpu
