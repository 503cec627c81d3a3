// What the launches of the kernels on the tensor cores share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <iterator>

#include "launch.h"
#include "mma_stage.cuh"

namespace exllama::cuda {

// f(octets as a constant of `all`).
template <const auto& all, std::size_t i = 0, typename F>
void with_octets(int64_t rows, const char* kernel, const F& f) {
  constexpr int octets = all[i];
  if (rows == kOctet * octets) return f(std::integral_constant<int, octets>{});
  if constexpr (i + 1 < std::size(all)) {
    with_octets<all, i + 1>(rows, kernel, f);
  } else {
    throw std::logic_error(std::string("exllama_ops: ") + kernel + ": no kernel for " + std::to_string(rows) + " rows");
  }
}

// f(the rows of a unit as a constant).
template <typename F>
void with_unit(int unit_k, const F& f) {
  if (unit_k == kMmaRunK) return f(std::integral_constant<int, kMmaRunK>{});
  f(std::integral_constant<int, kMmaMinUnitK>{});
}

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
void with_half_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat16) return f(Type<__half>{});
  f(Type<__nv_bfloat16>{});
}

inline MmaCut cut_of(const Weight& weight, const Config& config) {
  const int64_t unit_k = mma_unit_k(weight.K, weight.group_size);
  const int64_t units_in_group = std::min(divide_up(weight.group_size, unit_k), divide_up(weight.K, unit_k));
  return {config.k_per_split / kMmaRunK, static_cast<uint32_t>(divide_up(int64_t{1} << 32, 2 * units_in_group))};
}

}  // namespace exllama::cuda
