// The kernels for AVX-512 (F, BW, DQ, VL), with and without VNNI.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx512.h"
#include "kernels_scalar.h"

namespace exllama::cpu {
namespace {

// --- x and out ---------------------------------------------------------------------------------------------------

EXLLAMA_AVX512 void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of(count - i);
    __m512 value;
    if (dtype == DType::kFloat32) {
      const float* source = static_cast<const float*>(x);
      if (perm) {
        const __m512i index = _mm512_maskz_loadu_epi32(mask, perm + begin + i);
        value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, source, 4);
      } else {
        value = _mm512_maskz_loadu_ps(mask, source + begin + i);
      }
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(x);
      __m256i bits;
      if (perm) {
        alignas(32) uint16_t gathered[16] = {};
        const int valid = count - i < 16 ? count - i : 16;
        for (int j = 0; j < valid; ++j) gathered[j] = source[perm[begin + i + j]];
        bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(gathered));
      } else {
        bits = _mm256_maskz_loadu_epi16(mask, source + begin + i);
      }
      value = dtype == DType::kFloat16 ? _mm512_cvtph_ps(bits)
                                       : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    _mm512_mask_storeu_ps(out + i, mask, value);
  }
}

EXLLAMA_AVX512 void store(const float* values, int count, void* out, DType dtype) {
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of(count - i);
    const __m512 value = _mm512_maskz_loadu_ps(mask, values + i);
    if (dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, value);
      continue;
    }
    __m256i rounded;
    if (dtype == DType::kFloat16) {
      rounded = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      up = _mm512_srli_epi32(up, 16);
      up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
      rounded = _mm512_cvtepi32_epi16(up);
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, mask, rounded);
  }
}

EXLLAMA_AVX512 BlockScale quantize(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i highest = _mm512_setzero_si512();
  for (int i = 0; i < rows; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(mask_of(rows - i), x + i);
    highest = _mm512_max_epu32(highest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(highest);
  if (bits == 0 || bits >= 0x7f800000) return scalar::quantize(x, rows, stride, limit, first, second);

  const int exponent = scalar::scale_exponent(bits, limit);
  const __m512 up = _mm512_set1_ps(power_of_two(exponent < -126 ? 126 : -exponent));
  const __m512 more = _mm512_set1_ps(power_of_two(exponent < -126 ? -exponent - 126 : 0));
  __m512i largest = _mm512_setzero_si512(), sum = largest, sum_abs = largest;
  for (int i = 0; i < stride; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(mask_of(rows - i), x + i);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(value, up), more));
    const __m512i q_abs = _mm512_abs_epi32(q);
    largest = _mm512_max_epi32(largest, q_abs);
    sum = _mm512_add_epi32(sum, q);
    sum_abs = _mm512_add_epi32(sum_abs, q_abs);
    _mm256_mask_storeu_epi16(first + i, mask_of(stride - i), _mm512_cvtepi32_epi16(q));
  }
  BlockScale scale{{power_of_two(exponent), 1}, {_mm512_reduce_add_epi32(sum), 0}, Limbs::kOne};
  if (limit != 32767 || !scalar::has_outlier(rows, _mm512_reduce_max_epi32(largest), _mm512_reduce_add_epi32(sum_abs))) {
    return scale;
  }

  const int exponent2 = scalar::second_exponent(exponent);
  const __m512 finer = _mm512_set1_ps(power_of_two(exponent - exponent2));
  __m512i any = _mm512_setzero_si512(), second_sum = any;
  for (int i = 0; i < stride; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(mask_of(rows - i), x + i);
    const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(value, up), more);
    const __m512 rest = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(_mm512_cvtps_epi32(scaled)));
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(rest, finer));
    any = _mm512_or_si512(any, q);
    second_sum = _mm512_add_epi32(second_sum, q);
    _mm256_mask_storeu_epi16(second + i, mask_of(stride - i), _mm512_cvtepi32_epi16(q));
  }
  scale.scale[1] = power_of_two(exponent2);
  scale.sum[1] = _mm512_reduce_add_epi32(second_sum);
  if (_mm512_test_epi32_mask(any, any)) scale.limbs = Limbs::kTwo;
  return scale;
}

// --- weights -----------------------------------------------------------------------------------------------------

template <int kBits>
EXLLAMA_AVX512 void load_zeros_of(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  for (int n = 0; n < kPanelColumns; n += 16) {
    _mm512_storeu_si512(zeros + n, zeros_of_strip<kBits>(weight, group, column + n, mask_of(columns - n)));
  }
}

void load_zeros(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
  switch (weight.bits) {
    case 2: return load_zeros_of<2>(weight, group, column, columns, zeros);
    case 3: return load_zeros_of<3>(weight, group, column, columns, zeros);
    case 4: return load_zeros_of<4>(weight, group, column, columns, zeros);
    default: return load_zeros_of<8>(weight, group, column, columns, zeros);
  }
}

EXLLAMA_AVX512 void load_scales(const Weight& weight, int64_t group, int64_t column, int columns, float* scales) {
  for (int n = 0; n < kPanelColumns; n += 16) {
    _mm512_storeu_ps(scales + n, scales_of_strip(weight, group, column + n, mask_of(columns - n)));
  }
}

template <int kBits>
EXLLAMA_AVX512 void unpack_int16_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    const int32_t* zeros, int16_t* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  __m512i zero[kPanelColumns / 16];
  for (int v = 0; v < kPanelColumns / 16; ++v) zero[v] = both_halves(_mm512_loadu_si512(zeros + 16 * v));
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelColumns / 16; ++v) {
      const __mmask16 mask = mask_of(columns - 16 * v);
      __m512i words[kWords], pair[kPairs];
#pragma GCC unroll 3
      for (int w = 0; w < kWords; ++w) words[w] = _mm512_maskz_loadu_epi32(mask, block + w * weight.N + 16 * v);
      split_pairs<kBits>(words, pair);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        _mm512_storeu_si512(panel + 2 * (p * kPanelColumns + 16 * v), _mm512_sub_epi16(pair[p], zero[v]));
      }
    }
  }
}

template <int kBits>
EXLLAMA_AVX512 void unpack_uint8_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    uint8_t* panel) {
  constexpr int kWords = layout::block_words(kBits), kQuads = layout::block_values(kBits) / 4;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 4 * kQuads, block += kWords * weight.N, panel += 4 * kQuads * kPanelColumns) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelColumns / 16; ++v) {
      const __mmask16 mask = mask_of(columns - 16 * v);
      __m512i words[kWords], quad[kQuads];
#pragma GCC unroll 3
      for (int w = 0; w < kWords; ++w) words[w] = _mm512_maskz_loadu_epi32(mask, block + w * weight.N + 16 * v);
      split_quads<kBits>(words, quad);
#pragma GCC unroll 8
      for (int p = 0; p < kQuads; ++p) _mm512_storeu_si512(panel + 4 * (p * kPanelColumns + 16 * v), quad[p]);
    }
  }
}

template <int kBits>
EXLLAMA_AVX512 void unpack_float_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                    const int32_t* zeros, const float* scales, float* panel) {
  constexpr int kWords = layout::block_words(kBits), kPairs = layout::block_values(kBits) / 2;
  const uint32_t* block = words_of(weight, row, column);
  for (int i = 0; i < rows; i += 2 * kPairs, block += kWords * weight.N, panel += 2 * kPairs * kPanelColumns) {
    for (int v = 0; v < kPanelColumns / 16; ++v) {
      const __mmask16 mask = mask_of(columns - 16 * v);
      const __m512i zero = both_halves(_mm512_loadu_si512(zeros + 16 * v));
      const __m512 scale = scales ? _mm512_loadu_ps(scales + 16 * v) : _mm512_set1_ps(1);
      __m512i words[kWords], pair[kPairs];
#pragma GCC unroll 3
      for (int w = 0; w < kWords; ++w) words[w] = _mm512_maskz_loadu_epi32(mask, block + w * weight.N + 16 * v);
      split_pairs<kBits>(words, pair);
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) {
        const __m512i value = _mm512_sub_epi16(pair[p], zero);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(value, 16), 16));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(value, 16));
        float* out = panel + 2 * p * kPanelColumns + 16 * v;
        _mm512_storeu_ps(out, _mm512_maskz_mul_ps(mask, low, scale));
        _mm512_storeu_ps(out + kPanelColumns, _mm512_maskz_mul_ps(mask, high, scale));
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

void unpack_uint8(const Weight& weight, int64_t row, int rows, int64_t column, int columns, uint8_t* panel) {
  switch (weight.bits) {
    case 2: return unpack_uint8_of<2>(weight, row, rows, column, columns, panel);
    case 3: return unpack_uint8_of<3>(weight, row, rows, column, columns, panel);
    case 4: return unpack_uint8_of<4>(weight, row, rows, column, columns, panel);
    default: return unpack_uint8_of<8>(weight, row, rows, column, columns, panel);
  }
}

void unpack_float(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                  const float* scales, float* panel) {
  if (!fills_words(weight, row, rows)) {
    return scalar::unpack_float(weight, row, rows, column, columns, zeros, scales, panel);
  }
  switch (weight.bits) {
    case 2: return unpack_float_of<2>(weight, row, rows, column, columns, zeros, scales, panel);
    case 3: return unpack_float_of<3>(weight, row, rows, column, columns, zeros, scales, panel);
    case 4: return unpack_float_of<4>(weight, row, rows, column, columns, zeros, scales, panel);
    default: return unpack_float_of<8>(weight, row, rows, column, columns, zeros, scales, panel);
  }
}

// --- products ----------------------------------------------------------------------------------------------------

// mr rows of x by nr strips of the panel. 12 x 2 strips are 24 of 32 registers, which leaves the weights and one
// broadcast; fewer rows take 4 strips, so that enough sums are in flight for the 5 cycles of a dot product.
//
// The next rows of x and of acc come from L2: their lines, which follow those of this tile, are prefetched one in each
// step of the inner loop.
template <int mr, int nr, bool kVnni>
EXLLAMA_AVX512 void tile_int16(const Multiply<int16_t, int16_t>& args, int row, int strip) {
  const int64_t stride = args.x_stride;
  const int16_t* x = args.x + row * stride;
  const int16_t* panel = args.panel + 32 * strip;
  __m512i dot[mr][nr];
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) dot[m][v] = _mm512_setzero_si512();
  }
  // A pointer to every third row: the two that follow it are reached by index registers.
  const int16_t* base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last full tile nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64));
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns);
  for (int k = 0; k < args.depth; k += 2, panel += 2 * kPanelColumns) {
    _mm_prefetch(next_x, _MM_HINT_T0);
    _mm_prefetch(next_acc, _MM_HINT_T0);
    next_x += step;
    next_acc += step;
    __m512i weight[nr];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) weight[v] = _mm512_loadu_si512(panel + 32 * v);
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const __m512i pair = broadcast(base[m / 3] + m % 3 * stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) dot_int16<kVnni>(dot[m][v], weight[v], pair);
    }
  }
  const float* scales = args.scales + 16 * strip;
  float* acc = args.acc + row * kPanelColumns + 16 * strip;
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m, acc += kPanelColumns) {
    const __m512 x_scale = _mm512_set1_ps(args.x_scales[row + m].scale[args.limb]);
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) {
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][v]), x_scale);
      _mm512_storeu_ps(acc + 16 * v, _mm512_fmadd_ps(value, _mm512_loadu_ps(scales + 16 * v),
                                                     _mm512_loadu_ps(acc + 16 * v)));
    }
  }
}

template <int mr, int nr>
EXLLAMA_AVX512 void tile_int8(const Multiply<int8_t, uint8_t>& args, int row, int strip) {
  const int64_t stride = args.x_stride;
  const int8_t* x = args.x + row * stride;
  const uint8_t* panel = args.panel + 64 * strip;
  __m512i dot[mr][nr];
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) dot[m][v] = _mm512_setzero_si512();
  }
  const int8_t* base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last full tile nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64));
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns);
  for (int k = 0; k < args.depth; k += 4, panel += 4 * kPanelColumns) {
    _mm_prefetch(next_x, _MM_HINT_T0);
    _mm_prefetch(next_acc, _MM_HINT_T0);
    next_x += step;
    next_acc += step;
    __m512i weight[nr];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) weight[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const __m512i quad = broadcast(base[m / 3] + m % 3 * stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) dot_int8(dot[m][v], weight[v], quad);
    }
  }
  float* acc = args.acc + row * kPanelColumns + 16 * strip;
#pragma GCC unroll 4
  for (int v = 0; v < nr; ++v) {
    const __m512i zero = _mm512_loadu_si512(args.zeros + 16 * (strip + v));
    const __m512 scale = _mm512_loadu_ps(args.scales + 16 * (strip + v));
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const BlockScale& x_scale = args.x_scales[row + m];
      const __m512i centered = _mm512_sub_epi32(dot[m][v], _mm512_mullo_epi32(zero, _mm512_set1_epi32(x_scale.sum[0])));
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(centered), _mm512_set1_ps(x_scale.scale[0]));
      float* out = acc + m * kPanelColumns + 16 * v;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(out)));
    }
  }
}

template <int mr, int nr>
EXLLAMA_AVX512 void tile_float(const Multiply<float, float>& args, int row, int strip) {
  const int64_t stride = args.x_stride;
  const float* x = args.x + row * stride;
  const float* panel = args.panel + 16 * strip;
  __m512 sum[mr][nr];
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  const float* base[(mr + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (mr + 2) / 3; ++i) base[i] = x + 3 * i * stride;
  // After the last full tile nothing follows that is worth a place in L1.
  const int64_t step = args.rows - row >= 2 * mr ? 64 : 0;
  const char* next_x = reinterpret_cast<const char*>(x + mr * stride * (step / 64));
  const char* next_acc = reinterpret_cast<const char*>(args.acc + (row + mr * (step / 64)) * kPanelColumns);
  for (int k = 0; k < args.depth; ++k, panel += kPanelColumns) {
    _mm_prefetch(next_x, _MM_HINT_T0);
    _mm_prefetch(next_acc, _MM_HINT_T0);
    next_x += step;
    next_acc += step;
    __m512 weight[nr];
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) weight[v] = _mm512_loadu_ps(panel + 16 * v);
#pragma GCC unroll 12
    for (int m = 0; m < mr; ++m) {
      const __m512 value = _mm512_set1_ps(base[m / 3][m % 3 * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < nr; ++v) sum[m][v] = _mm512_fmadd_ps(value, weight[v], sum[m][v]);
    }
  }
  float* acc = args.acc + row * kPanelColumns + 16 * strip;
#pragma GCC unroll 12
  for (int m = 0; m < mr; ++m, acc += kPanelColumns) {
#pragma GCC unroll 4
    for (int v = 0; v < nr; ++v) {
      const __m512 scale = _mm512_loadu_ps(args.scales + 16 * (strip + v));
      _mm512_storeu_ps(acc + 16 * v, _mm512_fmadd_ps(sum[m][v], scale, _mm512_loadu_ps(acc + 16 * v)));
    }
  }
}

template <bool kVnni>
struct TileInt16 {
  using Args = Multiply<int16_t, int16_t>;
  template <int mr, int nr>
  static void run(const Args& args, int row, int strip) {
    tile_int16<mr, nr, kVnni>(args, row, strip);
  }
};
struct TileInt8 {
  using Args = Multiply<int8_t, uint8_t>;
  template <int mr, int nr>
  static void run(const Args& args, int row, int strip) {
    tile_int8<mr, nr>(args, row, strip);
  }
};
struct TileFloat {
  using Args = Multiply<float, float>;
  template <int mr, int nr>
  static void run(const Args& args, int row, int strip) {
    tile_float<mr, nr>(args, row, strip);
  }
};

// Two strips at a time: 12 rows, then what is left.
template <typename Tile, int mr>
void tall_tile(const typename Tile::Args& args, int row) {
  for (int strip = 0; strip * 16 < args.columns; strip += 2) Tile::template run<mr, 2>(args, row, strip);
}

// All four strips at once, for few rows.
template <typename Tile, int mr>
void wide_tile(const typename Tile::Args& args, int row) {
  if (args.columns <= 32) {
    Tile::template run<mr, 2>(args, row, 0);
  } else {
    Tile::template run<mr, 4>(args, row, 0);
  }
}

template <typename Tile>
void multiply(const typename Tile::Args& args) {
  int row = 0;
  for (; args.rows - row >= 12; row += 12) tall_tile<Tile, 12>(args, row);
  switch (args.rows - row) {
    case 11: return tall_tile<Tile, 11>(args, row);
    case 10: return tall_tile<Tile, 10>(args, row);
    case 9: return tall_tile<Tile, 9>(args, row);
    case 8: return tall_tile<Tile, 8>(args, row);
    case 7: return tall_tile<Tile, 7>(args, row);
    case 6: return wide_tile<Tile, 6>(args, row);
    case 5: return wide_tile<Tile, 5>(args, row);
    case 4: return wide_tile<Tile, 4>(args, row);
    case 3: return wide_tile<Tile, 3>(args, row);
    case 2: return wide_tile<Tile, 2>(args, row);
    case 1: return wide_tile<Tile, 1>(args, row);
    default: return;
  }
}

// mr rows of grad by kr rows of W: the lanes of both run along the columns.
template <int mr, int kr>
EXLLAMA_AVX512 void tile_dx(const float* grad, int64_t grad_stride, const float* panels, int parts, float* sums) {
  __m512 sum[mr][kr];
#pragma GCC unroll 4
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kr; ++k) sum[m][k] = _mm512_loadu_ps(sums + (m * kDxRows + k) * kLanes);
  }
  for (int part = 0; part < parts; ++part) {
    const float* left = grad + part * grad_stride;
    const float* right = panels + part * kDxRows * kPanelColumns;
#pragma GCC unroll 4
    for (int n = 0; n < kPanelColumns; n += 16) {
      __m512 weight[kr];
#pragma GCC unroll 4
      for (int k = 0; k < kr; ++k) weight[k] = _mm512_loadu_ps(right + k * kPanelColumns + n);
#pragma GCC unroll 4
      for (int m = 0; m < mr; ++m) {
        const __m512 value = _mm512_loadu_ps(left + m * kPanelColumns + n);
#pragma GCC unroll 4
        for (int k = 0; k < kr; ++k) sum[m][k] = _mm512_fmadd_ps(value, weight[k], sum[m][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kr; ++k) _mm512_storeu_ps(sums + (m * kDxRows + k) * kLanes, sum[m][k]);
  }
}

template <int mr>
void rows_dx(const float* grad, int64_t grad_stride, const float* panels, int panel_rows, int parts, float* sums) {
  int k = 0;
  for (; k + 4 <= panel_rows; k += 4) {
    tile_dx<mr, 4>(grad, grad_stride, panels + k * kPanelColumns, parts, sums + k * kLanes);
  }
  for (; k < panel_rows; ++k) {
    tile_dx<mr, 1>(grad, grad_stride, panels + k * kPanelColumns, parts, sums + k * kLanes);
  }
}

void multiply_dx(const float* grad, int64_t grad_stride, int rows, const float* panels, int panel_rows, int parts,
                 float* sums) {
  int m = 0;
  for (; m + 4 <= rows; m += 4) {
    rows_dx<4>(grad + m * kPanelColumns, grad_stride, panels, panel_rows, parts, sums + m * kDxRows * kLanes);
  }
  for (; m < rows; ++m) {
    rows_dx<1>(grad + m * kPanelColumns, grad_stride, panels, panel_rows, parts, sums + m * kDxRows * kLanes);
  }
}

EXLLAMA_AVX512 void sum_lanes(const float* sums, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    const __m512 sum = _mm512_loadu_ps(sums + i * kLanes);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    out[i] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
}

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512",
    load,
    store,
    quantize,
    load_zeros,
    load_scales,
    unpack_int16,
    unpack_float,
    multiply<TileInt16<false>>,
    multiply<TileFloat>,
    multiply_dx,
    sum_lanes,
    nullptr,
    nullptr,
    avx512::gemv,
};

const Kernels kAvx512VnniKernels = {
    "avx512_vnni",
    load,
    store,
    quantize,
    load_zeros,
    load_scales,
    unpack_int16,
    unpack_float,
    multiply<TileInt16<true>>,
    multiply<TileFloat>,
    multiply_dx,
    sum_lanes,
    unpack_uint8,
    multiply<TileInt8>,
    avx512::gemv_vnni,
};

}  // namespace exllama::cpu

#endif
