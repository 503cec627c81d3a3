// Every rule for the arguments of the ops: the twin of exllama_ops/layout/checks.py, rule by rule, in its order and
// with its texts. tests/ops/test_errors.py holds the two together.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/tensor.h"

namespace exllama::bindings {

// Each throws std::invalid_argument, which Python sees as ValueError with the same text.
Shape check_gptq_gemm(const Tensor& x, const WeightArguments& weight);
// The shape of each part.
std::vector<Shape> check_gptq_gemm_multi(const Tensor& x, const PartsArguments& parts);
Shape check_gptq_gemm_dx(const Tensor& grad, const WeightArguments& weight);
// The shape of each expert's weight.
Shape check_gptq_moe_gemm(const Tensor& x, const ExpertsArguments& experts);
Shape check_gptq_moe_gemm_dx(const Tensor& grad, const ExpertsArguments& experts);
Shape check_gptq_dequantize(const WeightArguments& weight);
// Return K.
int64_t check_gptq_shuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit);
int64_t check_gptq_unshuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit);

// The values of an index, which only a kernel whose indices lie in host memory can ask for. The first rule is that every
// entry lies in [0, limit), the second that none of [0, entries) comes twice. `seen` is scratch memory of as many bytes
// as entries.
void check_index_range(const char* op, const std::string& name, const int32_t* index, int64_t entries, int64_t limit);
void check_permutation(const char* op, const std::string& name, const int32_t* index, int64_t entries, uint8_t* seen);
// The two lists in the g_idx of a filled weight: what its K rows name, and the places of the in_features rows of W.
void check_filled_order(const char* op, const std::string& name, const int32_t* named, const int32_t* places, int64_t K,
                        int64_t in_features);
// The `count` offsets of experts in M rows.
void check_expert_offsets(const char* op, const int32_t* offsets, int64_t count, int64_t M);

}  // namespace exllama::bindings
