// The kernels for AVX-512 (F, BW, DQ, VL), with and without VNNI.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx512.h"

namespace exllama::cpu {
namespace {

// --- x and out ---------------------------------------------------------------------------------------------------

EXLLAMA_VECTOR void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
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

EXLLAMA_VECTOR void store(const float* values, int count, void* out, DType dtype) {
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

EXLLAMA_VECTOR BlockScale quantize(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second) {
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

EXLLAMA_VECTOR void pack_bytes(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out) {
  alignas(16) uint8_t order[16];
  const int values = layout::block_values(bits) < 16 ? layout::block_values(bits) : 16;
  for (int i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>(i / values * values + quad_order(bits, i % values));
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(order));
  for (int k = 0; k < rows; k += 16) {
    const __mmask16 mask = mask_of(rows - k);
    const __m256i values16 = _mm256_sra_epi16(_mm256_maskz_loadu_epi16(mask, limb + k), _mm_cvtsi32_si128(shift));
    const __m256i shifted = _mm256_add_epi16(values16, _mm256_set1_epi16(static_cast<int16_t>(offset)));
    _mm_mask_storeu_epi8(out + k, mask, _mm_shuffle_epi8(_mm256_cvtepi16_epi8(shifted), shuffle));
  }
}

// --- weights -----------------------------------------------------------------------------------------------------

template <int kBits>
EXLLAMA_VECTOR void load_zeros_of(const Weight& weight, int64_t group, int64_t column, int columns, int32_t* zeros) {
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

EXLLAMA_VECTOR void load_scales(const Weight& weight, int64_t group, int64_t column, int columns, float* scales) {
  for (int n = 0; n < kPanelColumns; n += 16) {
    _mm512_storeu_ps(scales + n, scales_of_strip(weight, group, column + n, mask_of(columns - n)));
  }
}

// 8-bit q do not fit int8 once centered, and q - 128 does: x - 128 flips the highest bit.
template <int kBits>
EXLLAMA_VECTOR void unpack_int8_of(const Weight& weight, int64_t row, int rows, int64_t column, int columns,
                                   const int32_t* zeros, int8_t* panel, int32_t* start) {
  constexpr int kWords = layout::block_words(kBits), kQuads = layout::block_values(kBits) / 4;
  const uint32_t* block = words_of(weight, row, column);
  const Int offsets = set_int(static_cast<int32_t>(kInt8Offset * 0x01010101u));
  Int zero[kStrips], sum[kStrips];
#pragma GCC unroll 4
  for (int v = 0; v < kStrips; ++v) {
    const Int twice = both_halves(load_int(zeros + kStrip * v));
    zero[v] = kBits == 8 ? offsets : bit_or(twice, shift_left(twice, 8));
    sum[v] = set_int(0);
  }
  for (int i = 0; i < rows; i += 4 * kQuads, block += kWords * weight.N, panel += 4 * kQuads * kPanelColumns) {
#pragma GCC unroll 4
    for (int v = 0; v < kStrips; ++v) {
      Int words[kWords], quad[kQuads];
      load_block<kBits>(block + kStrip * v, weight.N, columns - kStrip * v, words);
      split_quads<kBits>(words, quad);
#pragma GCC unroll 8
      for (int p = 0; p < kQuads; ++p) {
        const Int centered = sub_int8(quad[p], zero[v]);
        dot_int8(sum[v], offsets, centered);
        store_int(panel + 4 * (p * kPanelColumns + kStrip * v), centered);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kStrips; ++v) store_int(start + kStrip * v, sub_int32(set_int(0), sum[v]));
}

void unpack_int8(const Weight& weight, int64_t row, int rows, int64_t column, int columns, const int32_t* zeros,
                 int8_t* panel, int32_t* start) {
  switch (weight.bits) {
    case 2: return unpack_int8_of<2>(weight, row, rows, column, columns, zeros, panel, start);
    case 3: return unpack_int8_of<3>(weight, row, rows, column, columns, zeros, panel, start);
    case 4: return unpack_int8_of<4>(weight, row, rows, column, columns, zeros, panel, start);
    default: return unpack_int8_of<8>(weight, row, rows, column, columns, zeros, panel, start);
  }
}

struct Int8Product {
  using Args = Multiply<uint8_t, int8_t>;
  using Vector = Int;
  static constexpr int kDepth = 4;

  static EXLLAMA_VECTOR_INLINE Int start(const Args& args, int column) { return load_int(args.start + column); }
  static EXLLAMA_VECTOR_INLINE Int load(const int8_t* panel) { return load_int(panel); }
  static EXLLAMA_VECTOR_INLINE Int spread(const uint8_t* x) { return broadcast(x); }
  static EXLLAMA_VECTOR_INLINE void add(Int& sum, Int weight, Int x) { dot_int8(sum, x, weight); }
  static EXLLAMA_VECTOR_INLINE Float value(const Args& args, Int sum, int row, int column) {
    const BlockScale& x = args.x_scales[row];
    if (args.zeros) sum = sub_int32(sum, multiply_int32(load_int(args.zeros + column), set_int(x.sum[0])));
    return multiply(to_float(sum), set_float(x.scale[0]));
  }
};

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
    unpack_transposed,
    multiply_rows<Int16Product<false>>,
    multiply_rows<FloatProduct>,
    pack_bytes,
    nullptr,
    nullptr,
    avx512::gemv,
    nullptr,
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
    unpack_transposed,
    multiply_rows<Int16Product<true>>,
    multiply_rows<FloatProduct>,
    pack_bytes,
    unpack_int8,
    multiply_rows<Int8Product>,
    avx512::gemv_vnni,
    nullptr,
};

// Few rows and groups that fill no words are served as for VNNI.
const Kernels kAmxKernels = {
    "amx",
    load,
    store,
    quantize,
    load_zeros,
    load_scales,
    unpack_int16,
    unpack_float,
    unpack_transposed,
    multiply_rows<Int16Product<true>>,
    multiply_rows<FloatProduct>,
    pack_bytes,
    unpack_int8,
    multiply_rows<Int8Product>,
    avx512::gemv_vnni,
    &kAmxTiles,
};

}  // namespace exllama::cpu

#endif
