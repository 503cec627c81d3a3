// The kernels for AVX2 with FMA and F16C, with and without AVX-VNNI. Without it int8 values of x go through
// the int16 panel: vpmaddubsw would saturate.
#include "kernels.h"

#if EXLLAMA_X86

#include "avx2.h"

namespace exllama::cpu {
namespace {

EXLLAMA_VECTOR void load(const void* x, DType dtype, const int32_t* perm, int64_t begin, int count, float* out) {
  if (perm && dtype == DType::kFloat32) return scalar::load(x, dtype, perm, begin, count, out);
  const uint16_t* source = static_cast<const uint16_t*>(x);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    if (!perm) {
      _mm256_storeu_ps(out + i, load_any(x, dtype, begin + i, 8));
      continue;
    }
    alignas(16) uint16_t values[8];
    for (int j = 0; j < 8; ++j) values[j] = source[perm[begin + i + j]];
    _mm256_storeu_ps(out + i, widen(_mm_load_si128(reinterpret_cast<const __m128i*>(values)), dtype));
  }
  scalar::load(x, dtype, perm, begin + i, count - i, out + i);
}

EXLLAMA_VECTOR_INLINE uint32_t largest_of(__m256i values) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}

EXLLAMA_VECTOR bool store(const float* values, int count, void* out, DType dtype) {
  __m256i largest = _mm256_setzero_si256();
  int i = 0;
  if (dtype != DType::kFloat32) {
    uint16_t* target = static_cast<uint16_t*>(out);
    for (; i + 8 <= count; i += 8) {
      const __m256 value = _mm256_loadu_ps(values + i);
      const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
      largest = _mm256_max_epi32(largest, magnitude);
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
  const bool rest_is_finite = scalar::store(values + i, count - i, offset(out, dtype, i), dtype);
  return rest_is_finite && largest_of(largest) < 0x7f800000;
}

EXLLAMA_VECTOR_INLINE int32_t sum_of(__m256i values) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

EXLLAMA_VECTOR_INLINE void store_int16(__m256i values, int16_t* out) {
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

EXLLAMA_VECTOR BlockScale quantize(const float* x, int rows, int stride, int limit, int16_t* first, int16_t* second) {
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

EXLLAMA_VECTOR void pack_bytes(const int16_t* limb, int rows, int bits, int shift, int offset, uint8_t* out) {
  if (rows % 16) return scalar::pack_bytes(limb, rows, bits, shift, offset, out);
  alignas(16) uint8_t order[16];
  const int values = layout::block_values(bits) < 16 ? layout::block_values(bits) : 16;
  for (int i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>(i / values * values + quad_order(bits, i % values));
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(order));
  for (int k = 0; k < rows; k += 16) {
    const __m256i shifted = _mm256_sra_epi16(load_int(limb + k), _mm_cvtsi32_si128(shift));
    const __m256i moved = _mm256_add_epi16(shifted, _mm256_set1_epi16(static_cast<int16_t>(offset)));
    const __m256i bytes = _mm256_and_si256(moved, _mm256_set1_epi16(0xff));
    const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm_shuffle_epi8(packed, shuffle));
  }
}

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",
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
    avx2::gemv,
    nullptr,
};

const Kernels kAvx2VnniKernels = {
    "avx2_vnni",
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
    avx2::gemv_vnni,
    nullptr,
};

}  // namespace exllama::cpu

#endif
