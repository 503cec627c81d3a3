// Every rule for the arguments of the ops: the twin of exllama_ops/layout/checks.py, rule by rule, in its order and
// with its texts. tests/ops/test_errors.py holds the two together.
#pragma once

#include <cstdint>

#include "bindings/tensor.h"

namespace exllama::bindings {

// What a packed weight holds, once its arguments have passed.
struct Shape {
  int64_t K;
  int64_t N;
  int64_t G;
};

// The arguments that gptq_gemm, gptq_gemm_dx and gptq_dequantize share.
struct WeightArguments {
  const Tensor& qweight;
  const Tensor& qzeros;
  const Tensor& scales;
  const Tensor& g_idx;
  bool use_exllama;
  int64_t bit;
  int64_t group_size;
  int64_t part = -1;  // its index in lists of weights
};

// Each throws std::invalid_argument, which Python sees as ValueError with the same text.
Shape check_gptq_gemm(const Tensor& x, const WeightArguments& weight);
// Of x and the lengths of the lists; then of each part, which must have the groups of the first.
void check_gptq_gemm_multi(const Tensor& x, int64_t qweights, int64_t qzeros, int64_t scales);
Shape check_gptq_gemm_multi_part(const Tensor& x, const WeightArguments& weight, const Shape* first);
Shape check_gptq_gemm_dx(const Tensor& grad, const WeightArguments& weight);
Shape check_gptq_dequantize(const WeightArguments& weight);
// Return K.
int64_t check_gptq_shuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit);
int64_t check_gptq_unshuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit);

// The values of an index, which only a kernel whose indices lie in host memory can ask for: that every entry lies in
// [0, limit), and then that none of [0, entries) comes twice. `seen` is scratch memory of as many bytes as entries.
void check_index_range(const char* op, const char* name, const int32_t* index, int64_t entries, int64_t limit);
void check_permutation(const char* op, const char* name, const int32_t* index, int64_t entries, uint8_t* seen);

}  // namespace exllama::bindings
