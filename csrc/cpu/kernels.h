// What each instruction set implements: one table of functions per ISA, and the layouts that they share.
//
// A *block* is a run of at most kBlockRows rows of one group. A *panel* is a block of rows by kPanelColumns columns,
// unpacked: the rest of its columns, beyond N, are zero.
//
//   int16 panel  q - z as [row / 2][column][row % 2]: a 32-bit lane has the two rows that one 16-bit dot product takes
//   int8 panel   q, unsigned, as [row / 4][column][row % 4], the rows of a block in quad_order
//   float panel  q - z or scale * (q - z) as [row][column]
//
// All sums of integers are exact, and all float operations on one element are the same ones in the same order, so
// every ISA gives the same bits.
#pragma once

#include <cstdint>

#include "../layout/formats.h"
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EXLLAMA_X86 1
#else
#define EXLLAMA_X86 0
#endif

namespace exllama::cpu {

// 128 rows of 8-bit weights times int16 sum to at most 128 * 256 * 32767 < 2^30: int32 holds every block.
constexpr int kBlockRows = 128;

// An int16 panel of 128 x 64 is 16 KiB and shares L1 (32 KiB or more) with the rows of x; a row of words is 256 bytes.
constexpr int kPanelColumns = 64;

// Up to this many rows of x are multiplied straight from the words, as int16; int8 panels pay from fewer rows on.
constexpr int kGemvRows = 8, kGemvRowsInt8 = 4;
// The most sums of such a task: 16 KiB of float and, with one limb, as much of integers, which stay in L1.
constexpr int kGemvSums = 4096;

// A block of a row of x as integers: x = scale[0] * limb 0 + scale[1] * limb 1.
enum class Limbs : uint8_t { kNone = 0, kOne = 1, kTwo = 2 };  // kNone: x has NaN or inf and is multiplied as float

struct BlockScale {
  float scale[2];
  int32_t sum[2];  // of each limb
  Limbs limbs;
};

// acc (rows, kPanelColumns) += x (rows, depth) @ panel (depth, columns), by
//   integers: acc = fma(float(dot) * x_scale[row], scales[column], acc)
//   float:    acc = fma(sum of fma over ascending rows of the panel, scales[column], acc)
template <typename X, typename Panel>
struct Multiply {
  const X* x;
  int64_t x_stride;
  const BlockScale* x_scales;  // one per row, null for float
  int limb;
  int rows;
  int depth;  // rows of the panel
  const Panel* panel;
  int columns;
  const float* scales;  // [kPanelColumns]
  const int32_t* zeros;  // [kPanelColumns], for int8 panels
  float* acc;
};

// A few rows of x times a range of columns, straight from the words of a shuffled weight whose groups fill whole words.
struct Gemv {
  const Weight* weight;
  int rows;  // at most kGemvRows
  const int16_t* x;  // limb 0 of block b and row m at (b * rows + m) * x_stride
  const int16_t* x_second;
  int64_t x_stride;
  const BlockScale* x_scales;  // [b * rows + m]; none has Limbs::kNone
  int64_t column;
  int columns;  // rows * columns is at most kGemvSums
  float* acc;  // [rows][columns], all zero
};

struct Kernels {
  const char* name;

  // out[i] = x[perm ? perm[i] : i] in float32, for `count` entries from `begin` on.
  void (*load)(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out);
  void (*store)(const float* values, int count, void* out, DType dtype);
  // Rounds a block to limbs of at most `limit` (32767, or 127 for which there is no second limb), padded with zeros
  // to `stride` entries.
  BlockScale (*quantize)(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second);

  // The zero points and scales of one group, zero beyond `columns`.
  void (*load_zeros)(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros);
  void (*load_scales)(const Weight& weight, int64_t group, int64_t column, int columns, float* scales);
  void (*unpack_int16)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       int16_t* panel);
  void (*unpack_float)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                       const float* scales, float* panel);

  void (*multiply_int16)(const Multiply<int16_t, int16_t>& multiply);
  void (*multiply_float)(const Multiply<float, float>& multiply);

  // sums[row][k][lane] += grad[part][row][column] * panels[part][k][column] with lane = column % kLanes, and the sum
  // of the lanes. The parts of grad are grad_stride floats apart, those of panels kDxRows * kPanelColumns.
  void (*multiply_dx)(const float* grad, int64_t grad_stride, int rows, const float* panels, int panel_rows, int parts,
                      float* sums);
  void (*sum_lanes)(const float* sums, int count, float* out);

  // Null where an ISA has none: then int8 values go through the int16 panel, to the same result.
  void (*unpack_uint8)(const Weight& weight, int64_t row, int rows, int64_t column, int columns, uint8_t* panel);
  void (*multiply_int8)(const Multiply<int8_t, uint8_t>& multiply);
  // Null where panels serve few rows as well.
  void (*gemv)(const Gemv& gemv);
};

constexpr int kLanes = 16;
// gemm_dx: 32 rows by four panels of float are 32 KiB; a 3-bit block is 32 rows.
constexpr int kDxRows = 32;
constexpr int kDxParts = 4;

extern const Kernels kScalarKernels;
#if EXLLAMA_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

// The table of the ISA in use.
const Kernels& kernels();

// Whether rows [row, row + rows) are whole blocks of a shuffled weight, which is what vector code unpacks.
inline bool fills_words(const Weight& weight, int64_t row, int rows) {
  const int values = layout::block_values(weight.bits);
  return weight.shuffled && row % values == 0 && rows % values == 0;
}

// Where a row of x lies in a quad of bytes of the int8 panel, see split_quads: row quad_order(bits, i) of each block is
// its i-th byte.
//   4 bits: w & 0x0f0f0f0f has the rows 0 4 1 5, (w >> 4) & 0x0f0f0f0f the rows 2 6 3 7
//   2 bits: (w >> 2 i) & 0x03030303 has the rows 2 i, 2 i + 8, 2 i + 1, 2 i + 9
//   3 bits: two pairs interleaved, 0 2 1 3
constexpr int quad_order(int bits, int i) {
  const int quad = i / 4, odd = i % 4 / 2, far = i % 2;
  if (bits == 4) return 2 * quad + odd + 4 * far;
  if (bits == 2) return 2 * quad + odd + 8 * far;
  if (bits == 3) return 4 * quad + odd + 2 * far;
  return i;
}

// The words of the block of values that row k begins or lies in.
inline const uint32_t* words_of(const Weight& weight, int64_t k, int64_t column) {
  const int64_t block = k / layout::block_values(weight.bits);
  return weight.qweight + block * layout::block_words(weight.bits) * weight.N + column;
}

// Row k of q, for `columns` columns from `column` on.
void unpack_row(const uint32_t* qweight, int64_t N, int bits, bool shuffled, int64_t k, int64_t column, int columns,
                int32_t* out);

}  // namespace exllama::cpu
