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
    if (!perm) {
      value = load_any(x, dtype, begin + i, count - i);
    } else if (dtype == DType::kFloat32) {
      const __m512i index = _mm512_maskz_loadu_epi32(mask, perm + begin + i);
      value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, static_cast<const float*>(x), 4);
    } else {
      alignas(32) uint16_t gathered[16] = {};
      const int valid = count - i < 16 ? count - i : 16;
      for (int j = 0; j < valid; ++j) gathered[j] = static_cast<const uint16_t*>(x)[perm[begin + i + j]];
      value = widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(gathered)), dtype);
    }
    _mm512_mask_storeu_ps(out + i, mask, value);
  }
}

EXLLAMA_VECTOR bool store(const float* values, int count, void* out, DType dtype) {
  constexpr int kInfOrNan = 0x99;
  __mmask16 not_finite = 0;
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of(count - i);
    const __m512 value = _mm512_maskz_loadu_ps(mask, values + i);
    not_finite |= _mm512_fpclass_ps_mask(value, kInfOrNan);
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
  return !not_finite;
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
