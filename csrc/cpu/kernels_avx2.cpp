// The kernels for AVX2 with FMA and F16C. int8 values of x go through the int16 panel: vpmaddubsw would saturate.
#include "kernels.h"

#if EXLLAMA_X86

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels_scalar.h"

#define EXLLAMA_AVX2 __attribute__((target("avx2,fma,f16c")))
#define EXLLAMA_AVX2_INLINE EXLLAMA_AVX2 inline __attribute__((always_inline))

namespace exllama::cpu {
namespace {

// The first `count` of 8 lanes.
EXLLAMA_AVX2_INLINE __m256i mask_of(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

EXLLAMA_AVX2_INLINE __m256 widen(__m128i values, DType dtype) {
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(values);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

EXLLAMA_AVX2 void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
  if (dtype == DType::kFloat32) return scalar::load(x, dtype, perm, begin, count, out);
  const uint16_t* source = static_cast<const uint16_t*>(x);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    uint16_t values[8];
    if (perm) {
      for (int j = 0; j < 8; ++j) values[j] = source[perm[begin + i + j]];
    } else {
      std::memcpy(values, source + begin + i, sizeof values);
    }
    _mm256_storeu_ps(out + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), dtype));
  }
  scalar::load(x, dtype, perm, begin + i, count - i, out + i);
}

EXLLAMA_AVX2 void store(const float* values, int count, void* out, DType dtype) {
  int i = 0;
  if (dtype != DType::kFloat32) {
    uint16_t* target = static_cast<uint16_t*>(out);
    for (; i + 8 <= count; i += 8) {
      const __m256 value = _mm256_loadu_ps(values + i);
      __m128i rounded;
      if (dtype == DType::kFloat16) {
        rounded = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        up = _mm256_srli_epi32(up, 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
        rounded = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), rounded);
    }
  }
  scalar::store(values + i, count - i, offset(out, dtype, i), dtype);
}

EXLLAMA_AVX2_INLINE int32_t sum_of(__m256i values) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

EXLLAMA_AVX2_INLINE uint32_t largest_of(__m256i values) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}

EXLLAMA_AVX2_INLINE void store_int16(__m256i values, int16_t* out) {
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

EXLLAMA_AVX2 BlockScale quantize(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second) {
  __m256i highest = _mm256_setzero_si256();
  for (int i = 0; i + 8 <= rows; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
    highest = _mm256_max_epi32(highest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  const uint32_t bits = largest_of(highest);
  if (rows % 8 || bits == 0 || bits >= 0x7f800000) return scalar::quantize(x, rows, stride, limit, first, second);

  const int exponent = scalar::scale_exponent(bits, limit);
  const __m256 up = _mm256_set1_ps(power_of_two(exponent < -126 ? 126 : -exponent));
  const __m256 more = _mm256_set1_ps(power_of_two(exponent < -126 ? -exponent - 126 : 0));
  __m256i largest = _mm256_setzero_si256(), sum = largest, sum_abs = largest;
  for (int i = 0; i < rows; i += 8) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), up), more));
    largest = _mm256_max_epi32(largest, _mm256_abs_epi32(q));
    sum = _mm256_add_epi32(sum, q);
    sum_abs = _mm256_add_epi32(sum_abs, _mm256_abs_epi32(q));
    store_int16(q, first + i);
  }
  std::memset(first + rows, 0, (stride - rows) * sizeof *first);
  BlockScale scale{{power_of_two(exponent), 1}, {sum_of(sum), 0}, Limbs::kOne};
  if (limit != 32767 || !scalar::has_outlier(rows, largest_of(largest), sum_of(sum_abs))) return scale;

  const int exponent2 = scalar::second_exponent(exponent);
  const __m256 finer = _mm256_set1_ps(power_of_two(exponent - exponent2));
  __m256i any = _mm256_setzero_si256(), second_sum = any;
  for (int i = 0; i < rows; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), up), more);
    const __m256 rest = _mm256_sub_ps(scaled, _mm256_cvtepi32_ps(_mm256_cvtps_epi32(scaled)));
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(rest, finer));
    any = _mm256_or_si256(any, q);
    second_sum = _mm256_add_epi32(second_sum, q);
    store_int16(q, second + i);
  }
  std::memset(second + rows, 0, (stride - rows) * sizeof *second);
  scale.scale[1] = power_of_two(exponent2);
  scale.sum[1] = sum_of(second_sum);
  if (!_mm256_testz_si256(any, any)) scale.limbs = Limbs::kTwo;
  return scale;
}

void load_scales(const Weight& weight, int64_t group, int64_t column, int columns, float* scales) {
  load(offset(weight.scales, weight.scales_dtype, group * weight.N), weight.scales_dtype, nullptr, column, columns,
       scales);
  for (int n = columns; n < kPanelColumns; ++n) scales[n] = 0;
}

// A block of words of a shuffled weight, 8 columns, as pairs: pair[p] has rows 2 p and 2 p + 1 as 16-bit lanes.
template <int kBits>
EXLLAMA_AVX2_INLINE void split_pairs(const __m256i* words, __m256i* pair) {
  if (kBits == 8) {
    const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
    // 3 2 1 0 -> 3 1 2 0, whose even bytes are rows 0 and 1, the odd ones 2 and 3
    const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5,
                                           7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i ordered = _mm256_shuffle_epi8(words[0], order);
    pair[0] = _mm256_and_si256(ordered, mask);
    pair[1] = _mm256_and_si256(_mm256_srli_epi32(ordered, 8), mask);
  } else if (kBits == 3) {
    const __m256i mask = _mm256_set1_epi32(0x00070007), bit = _mm256_set1_epi32(0x00010001);
#pragma GCC unroll 3
    for (int w = 0; w < 3; ++w) {
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) pair[5 * w + i] = _mm256_and_si256(_mm256_srli_epi32(words[w], 3 * i), mask);
    }
    // Bit b of the last pair is bits 15 and 31 of word b.
    const __m256i b0 = _mm256_and_si256(_mm256_srli_epi32(words[0], 15), bit);
    const __m256i b1 = _mm256_and_si256(_mm256_srli_epi32(words[1], 14), _mm256_slli_epi32(bit, 1));
    const __m256i b2 = _mm256_and_si256(_mm256_srli_epi32(words[2], 13), _mm256_slli_epi32(bit, 2));
    pair[15] = _mm256_or_si256(_mm256_or_si256(b0, b1), b2);
  } else {
    const __m256i mask = _mm256_set1_epi32(kBits == 4 ? 0x000f000f : 0x00030003);
#pragma GCC unroll 8
    for (int i = 0; i < 16 / kBits; ++i) pair[i] = _mm256_and_si256(_mm256_srli_epi32(words[0], kBits * i), mask);
  }
}

// The pairs of 8 columns of one block, minus the zero points.
template <int kBits>
EXLLAMA_AVX2_INLINE void centered_pairs(const uint32_t* block, int64_t N, int columns, const int32_t* zeros,
                                        __m256i* pair) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const __m256i mask = mask_of(columns);
  const __m256i zero = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zeros));
  const __m256i both = _mm256_or_si256(zero, _mm256_slli_epi32(zero, 16));
  __m256i words[kWords];
#pragma GCC unroll 3
  for (int w = 0; w < kWords; ++w) {
    words[w] = _mm256_maskload_epi32(reinterpret_cast<const int*>(block + w * N), mask);
  }
  split_pairs<kBits>(words, pair);
#pragma GCC unroll 16
  for (int p = 0; p < kPairs; ++p) pair[p] = _mm256_sub_epi16(pair[p], both);
}

template <int kBits>
EXLLAMA_AVX2 void unpack_int16_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                  const int32_t* zeros, int16_t* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
    for (int n = 0; n < kPanelColumns; n += 8) {
      __m256i pair[kPairs];
      centered_pairs<kBits>(block + n, weight.N, columns - n, zeros + n, pair);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + 2 * (p * kPanelColumns + n)), pair[p]);
      }
    }
  }
}

template <int kBits>
EXLLAMA_AVX2 void unpack_float_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                  const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
    for (int n = 0; n < kPanelColumns; n += 8) {
      __m256i pair[kPairs];
      centered_pairs<kBits>(block + n, weight.N, columns - n, zeros + n, pair);
      const __m256 scale = scales ? _mm256_loadu_ps(scales + n) : _mm256_set1_ps(1);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        float* out = panel + 2 * p * kPanelColumns + n;
        const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(pair[p], 16), 16);
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(low), scale));
        const __m256i high = _mm256_srai_epi32(pair[p], 16);
        _mm256_storeu_ps(out + kPanelColumns, _mm256_mul_ps(_mm256_cvtepi32_ps(high), scale));
      }
    }
  }
}

void unpack_int16(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  int16_t* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_int16(weight, row, rows, column, columns, zeros, panel);
  }
  switch (weight.bits) {
    case 2: return unpack_int16_of<2>(weight, row, rows, column, columns, zeros, panel);
    case 3: return unpack_int16_of<3>(weight, row, rows, column, columns, zeros, panel);
    case 4: return unpack_int16_of<4>(weight, row, rows, column, columns, zeros, panel);
    default: return unpack_int16_of<8>(weight, row, rows, column, columns, zeros, panel);
  }
}

void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  const float* scales, float* panel) {
  // The scales of absent columns may be anything.
  if (!fills_words(weight, row, rows) || columns < kPanelColumns) {
    return scalar::unpack_float(weight, row, rows, column, columns, zeros, scales, panel);
  }
  switch (weight.bits) {
    case 2: return unpack_float_of<2>(weight, row, rows, column, columns, zeros, scales, panel);
    case 3: return unpack_float_of<3>(weight, row, rows, column, columns, zeros, scales, panel);
    case 4: return unpack_float_of<4>(weight, row, rows, column, columns, zeros, scales, panel);
    default: return unpack_float_of<8>(weight, row, rows, column, columns, zeros, scales, panel);
  }
}

// mr rows by two strips of 8 columns: of 16 registers, 6 x 2 sums leave two weights, a broadcast and a product.
template <int mr>
EXLLAMA_AVX2 void tile_int16(const Multiply<int16_t, int16_t>& args, int row, int column) {
  const int16_t* x = args.x + row * args.x_stride;
  const int16_t* panel = args.panel + 2 * column;
  __m256i dot[mr][2];
#pragma GCC unroll 6
  for (int m = 0; m < mr; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
  for (int k = 0; k < args.depth; k += 2, panel += 2 * kPanelColumns) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 16));
#pragma GCC unroll 6
    for (int m = 0; m < mr; ++m) {
      int32_t two;
      std::memcpy(&two, x + m * args.x_stride + k, sizeof two);
      const __m256i pair = _mm256_set1_epi32(two);
      dot[m][0] = _mm256_add_epi32(dot[m][0], _mm256_madd_epi16(w0, pair));
      dot[m][1] = _mm256_add_epi32(dot[m][1], _mm256_madd_epi16(w1, pair));
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < mr; ++m) {
    const __m256 x_scale = _mm256_set1_ps(args.x_scales[row + m].scale[args.limb]);
    float* acc = args.acc + (row + m) * kPanelColumns + column;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[m][v]), x_scale);
      const __m256 scale = _mm256_loadu_ps(args.scales + column + 8 * v);
      _mm256_storeu_ps(acc + 8 * v, _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(acc + 8 * v)));
    }
  }
}

template <int mr>
EXLLAMA_AVX2 void tile_float(const Multiply<float, float>& args, int row, int column) {
  const float* x = args.x + row * args.x_stride;
  const float* panel = args.panel + column;
  __m256 sum[mr][2];
#pragma GCC unroll 6
  for (int m = 0; m < mr; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
  for (int k = 0; k < args.depth; ++k, panel += kPanelColumns) {
    const __m256 w0 = _mm256_loadu_ps(panel), w1 = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
    for (int m = 0; m < mr; ++m) {
      const __m256 value = _mm256_set1_ps(x[m * args.x_stride + k]);
      sum[m][0] = _mm256_fmadd_ps(value, w0, sum[m][0]);
      sum[m][1] = _mm256_fmadd_ps(value, w1, sum[m][1]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < mr; ++m) {
    float* acc = args.acc + (row + m) * kPanelColumns + column;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256 scale = _mm256_loadu_ps(args.scales + column + 8 * v);
      _mm256_storeu_ps(acc + 8 * v, _mm256_fmadd_ps(sum[m][v], scale, _mm256_loadu_ps(acc + 8 * v)));
    }
  }
}

struct TileInt16 {
  using Args = Multiply<int16_t, int16_t>;
  template <int mr>
  static void run(const Args& args, int row, int column) {
    tile_int16<mr>(args, row, column);
  }
};
struct TileFloat {
  using Args = Multiply<float, float>;
  template <int mr>
  static void run(const Args& args, int row, int column) {
    tile_float<mr>(args, row, column);
  }
};

template <typename Tile, int mr>
void tiles(const typename Tile::Args& args, int row) {
  for (int column = 0; column < args.columns; column += 16) Tile::template run<mr>(args, row, column);
}

template <typename Tile>
void multiply(const typename Tile::Args& args) {
  int row = 0;
  for (; args.rows - row >= 6; row += 6) tiles<Tile, 6>(args, row);
  switch (args.rows - row) {
    case 5: return tiles<Tile, 5>(args, row);
    case 4: return tiles<Tile, 4>(args, row);
    case 3: return tiles<Tile, 3>(args, row);
    case 2: return tiles<Tile, 2>(args, row);
    case 1: return tiles<Tile, 1>(args, row);
    default: return;
  }
}

// One row of grad by one row of W after the other, the kLanes sums as two registers; four rows of W at a time.
template <int kr>
EXLLAMA_AVX2 void tile_dx(const float* grad, int64_t grad_stride, const float* panels, int parts, float* sums) {
  __m256 sum[kr][2];
#pragma GCC unroll 4
  for (int k = 0; k < kr; ++k) {
    sum[k][0] = _mm256_loadu_ps(sums + k * kLanes);
    sum[k][1] = _mm256_loadu_ps(sums + k * kLanes + 8);
  }
  for (int part = 0; part < parts; ++part) {
    const float* left = grad + part * grad_stride;
    const float* right = panels + part * kDxRows * kPanelColumns;
    for (int n = 0; n < kPanelColumns; n += kLanes) {
      const __m256 g0 = _mm256_loadu_ps(left + n), g1 = _mm256_loadu_ps(left + n + 8);
#pragma GCC unroll 4
      for (int k = 0; k < kr; ++k) {
        const float* weight = right + k * kPanelColumns + n;
        sum[k][0] = _mm256_fmadd_ps(g0, _mm256_loadu_ps(weight), sum[k][0]);
        sum[k][1] = _mm256_fmadd_ps(g1, _mm256_loadu_ps(weight + 8), sum[k][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kr; ++k) {
    _mm256_storeu_ps(sums + k * kLanes, sum[k][0]);
    _mm256_storeu_ps(sums + k * kLanes + 8, sum[k][1]);
  }
}

void multiply_dx(const float* grad, int64_t grad_stride, int rows, const float* panels, int panel_rows, int parts,
                 float* sums) {
  for (int m = 0; m < rows; ++m, grad += kPanelColumns, sums += kDxRows * kLanes) {
    int k = 0;
    for (; k + 4 <= panel_rows; k += 4) {
      tile_dx<4>(grad, grad_stride, panels + k * kPanelColumns, parts, sums + k * kLanes);
    }
    for (; k < panel_rows; ++k) tile_dx<1>(grad, grad_stride, panels + k * kPanelColumns, parts, sums + k * kLanes);
  }
}

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",
    load,
    store,
    quantize,
    scalar::load_zeros,
    load_scales,
    unpack_int16,
    unpack_float,
    multiply<TileInt16>,
    multiply<TileFloat>,
    multiply_dx,
    scalar::sum_lanes,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace exllama::cpu

#endif
