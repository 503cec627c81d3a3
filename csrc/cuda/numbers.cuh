// Numbers in memory become the float32 of all arithmetic, and are made of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout/weight.h"
#include "overlap.cuh"

namespace exllama::cuda {

using layout::DType;
using layout::Weight;

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T rounded(float value);
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <>
__device__ inline float rounded<float>(float value) {
  return value;
}

// One number of an array whose dtype is known at run time. Scales go through these functions, and so do x and the
// results of all kernels but gemm_mma. A branch at the ends of a kernel costs less than three times the kernels.
__device__ inline float load_number(const void* array, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(array)[index]);
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(array)[index]);
  return static_cast<const float*>(array)[index];
}

// Four numbers of 16 bits.
__device__ inline float4 floats_of(const uint2& pairs, DType dtype) {
  if (dtype == DType::kBFloat16) {
    return make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xFFFF0000u),
                       __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xFFFF0000u));
  }
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&pairs.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&pairs.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

// Four numbers from an index on, at which they are aligned.
__device__ inline float4 load_four(const void* array, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32)
    return load_global(reinterpret_cast<const float4*>(static_cast<const float*>(array) + index));
  return floats_of(load_global(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(array) + index)), dtype);
}

__device__ inline void store_number(float value, void* array, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) {
    static_cast<__half*>(array)[index] = rounded<__half>(value);
  } else if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(array)[index] = rounded<__nv_bfloat16>(value);
  } else {
    static_cast<float*>(array)[index] = value;
  }
}

}  // namespace exllama::cuda
