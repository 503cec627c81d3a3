#include "bindings/checks.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "layout/dispatch.h"

namespace exllama::bindings {
namespace {

using layout::Format;

[[noreturn]] void refuse(const char* op, const std::string& text) {
  throw std::invalid_argument(std::string(op) + ": " + text);
}

std::string str(int64_t value) { return std::to_string(value); }

// The name of an argument, which may be an entry of a list.
struct Name {
  Name(const char* of_argument, int64_t of_part = -1) : argument(of_argument), part(of_part) {}
  const char* argument;
  int64_t part;

  std::string str() const {
    return part < 0 ? std::string(argument) : std::string(argument) + "[" + std::to_string(part) + "]";
  }
};

// A tuple of integers as Python prints it.
std::string tuple(const int64_t* values, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + str(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

// `lead` dimensions are left out.
std::string shape_of(const Tensor& tensor, int64_t lead = 0) {
  return tuple(tensor.sizes() + lead, tensor.dim() - lead);
}

// A dtype as Python prints it. The order is that of torch's ScalarType.
std::string dtype_name(int32_t dtype) {
  // clang-format off
  static constexpr const char* kNames[] = {
      "uint8",       "int8",          "int16",       "int32",         "int64",          "float16",    "float32",
      "float64",     "complex32",     "complex64",   "complex128",    "bool",           "qint8",      "quint8",
      "qint32",      "bfloat16",      "quint4x2",    "quint2x4",      "bits1x8",        "bits2x4",    "bits4x2",
      "bits8",       "bits16",        "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz",
      "uint16",      "uint32",        "uint64",      "uint1",         "uint2",          "uint3",      "uint4",
      "uint5",       "uint6",         "uint7",       "int1",          "int2",           "int3",       "int4",
      "int5",        "int6",          "int7",        "float8_e8m0fnu", "float4_e2m1fn_x2"};
  // clang-format on
  constexpr int32_t kCount = sizeof(kNames) / sizeof(kNames[0]);
  return dtype >= 0 && dtype < kCount ? std::string("torch.") + kNames[dtype] : "dtype " + str(dtype);
}

// A device as Python prints it. The order is that of torch's DeviceType.
std::string device_name(const Tensor& tensor) {
  // clang-format off
  static constexpr const char* kNames[] = {"cpu",   "cuda", "mkldnn", "opengl", "opencl", "ideep", "hip",
                                           "fpga",  "maia", "xla",    "vulkan", "metal",  "xpu",   "mps",
                                           "meta",  "hpu",  "ve",     "lazy",   "ipu",    "mtia",  "privateuseone"};
  // clang-format on
  constexpr int32_t kCount = sizeof(kNames) / sizeof(kNames[0]);
  const int32_t type = tensor.device_type();
  const std::string name = type >= 0 && type < kCount ? kNames[type] : "device type " + str(type);
  return tensor.device_index() < 0 ? name : name + ":" + str(tensor.device_index());
}

bool is_contiguous(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    if (tensor.stride(d) != expected && tensor.size(d) > 1) return tensor.elements() == 0;
    expected *= tensor.size(d);
  }
  return true;
}

// The ops take tensors of 32 bits and of 16.
int64_t element_bytes(const Tensor& tensor) {
  return tensor.dtype() == kInt32 ? 4 : layout::bytes_of(dtype_of(tensor));
}

bool overlap(const Tensor& a, const Tensor& b) {
  // Lazy copies of one tensor have their own memory once they were asked for a pointer to write to.
  const auto begin = [](const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data<void>()); };
  const auto end = [&](const Tensor& tensor) {
    return begin(tensor) + static_cast<uintptr_t>(tensor.elements() * element_bytes(tensor));
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

void check_tensor(const char* op, Name name, const Tensor& tensor, int64_t dim, std::initializer_list<int32_t> dtypes,
                  const Tensor& first) {
  if (!tensor.defined()) {
    refuse(op, name.str() + " must be a tensor; got None" + (dim == 1 ? "; an empty int32 tensor means none" : ""));
  }
  if (tensor.dim() != dim) {
    refuse(op, name.str() + " must have " + str(dim) + (dim > 1 ? " dimensions" : " dimension") + "; got " +
                   str(tensor.dim()));
  }
  bool allowed = false;
  for (int32_t dtype : dtypes) allowed = allowed || tensor.dtype() == dtype;
  if (!allowed) {
    std::string names;
    for (int32_t dtype : dtypes) names += (names.empty() ? "" : ", ") + dtype_name(dtype);
    refuse(op, name.str() + " must be " + (dtypes.size() > 1 ? "one of " : "") + names + "; got " +
                   dtype_name(tensor.dtype()));
  }
  if (!tensor.on_the_device_of(first)) {
    refuse(op,
           name.str() + " must be on " + device_name(first) + " like the first argument; got " + device_name(tensor));
  }
  if (!is_contiguous(tensor)) {
    refuse(op, name.str() + " must be contiguous; got shape " + shape_of(tensor) + " with strides " +
                   tuple(tensor.strides(), tensor.dim()));
  }
  const int64_t elements = tensor.elements(), needed = (tensor.storage_offset() + elements) * element_bytes(tensor);
  if (elements != 0 && tensor.storage_bytes() < needed) {
    refuse(op, name.str() + " must have a storage of at least " + str(needed) + " bytes; got " +
                   str(tensor.storage_bytes()) + ", as if it had been freed");
  }
}

void check_float_tensor(const char* op, Name name, const Tensor& tensor, const Tensor& first, int64_t dim = 2) {
  check_tensor(op, name, tensor, dim, {kFloat16, kBFloat16, kFloat32}, first);
}

const Format& check_bits(const char* op, int64_t bits) {
  for (const int width : layout::kWidths) {
    if (width == bits) return layout::format_of(width);
  }
  std::string supported;
  for (const int width : layout::kWidths) supported += (supported.empty() ? "" : ", ") + str(width);
  refuse(op, "bit must be one of (" + supported + "); got " + str(bits));
}

void check_fills_words(const char* op, Name name, int64_t size, const Format& format) {
  if (size > 0 && size % format.block_values == 0) return;
  refuse(op, name.str() + " must be a positive multiple of " + str(format.block_values) + ", the " + str(format.bits) +
                 "-bit values that fill whole 32-bit words; got " + name.str() + "=" + str(size));
}

// The number of its rows stands after `lead` others.
int64_t check_rows(const char* op, const Tensor& qweight, const Format& format, int64_t lead = 0) {
  const int64_t rows = qweight.size(lead);
  if (rows <= 0 || rows % format.block_words != 0) {
    refuse(op, "qweight must have a positive multiple of " + str(format.block_words) +
                   " rows of words for bits=" + str(format.bits) + "; got shape " + shape_of(qweight, lead));
  }
  return rows * 32 / format.bits;
}

void check_shape(const char* op, Name name, const Tensor& tensor, const char* formula, int64_t rows, int64_t columns,
                 const std::string& given) {
  const int64_t lead = tensor.dim() - 2;
  if (tensor.size(lead) == rows && tensor.size(lead + 1) == columns) return;
  const int64_t expected[] = {rows, columns};
  refuse(op, name.str() + " must have shape " + formula + " = " + tuple(expected, 2) + " for " + given + "; got " +
                 shape_of(tensor, lead));
}

// Tensors of a weight, which may be entries of lists, or of stacks that have passed their own checks.
struct WeightTensors {
  const Tensor& qweight;
  const Tensor& qzeros;
  const Tensor& scales;
  int64_t part = -1;        // its index in the lists or stacks
  int64_t lead = 0;         // dimensions of a stack before those of its entries
  int64_t order_part = -1;  // the index of its g_idx, where each weight of a stack has one
};

// The texts below are built only where a rule is broken: a call has a few microseconds in all.
Shape check_weight(const char* op, const WeightTensors& weight, const Options& options, const Tensor& first,
                   const int64_t* K_of_x, const int64_t* N_of_grad) {
  const auto& [qweight, qzeros, scales, part, lead, order_part] = weight;
  const Tensor& g_idx = options.g_idx;
  const bool use_exllama = options.use_exllama;
  const int64_t bits = options.bit, group_size = options.group_size;
  const Format& format = check_bits(op, bits);
  if (lead == 0) {
    check_tensor(op, {"qweight", part}, qweight, 2, {kInt32}, first);
    check_tensor(op, {"qzeros", part}, qzeros, 2, {kInt32}, first);
    check_float_tensor(op, {"scales", part}, scales, first);
    check_tensor(op, "g_idx", g_idx, 1, {kInt32}, first);
  }

  const int64_t entries = g_idx.size(g_idx.dim() - 1);
  const bool may_be_filled = use_exllama && (!K_of_x || entries > *K_of_x);
  const int64_t rows = !K_of_x || may_be_filled ? check_rows(op, qweight, format, lead) : *K_of_x;
  const bool filled = may_be_filled && rows < entries && entries <= 2 * rows && (!K_of_x || *K_of_x == entries - rows);
  const int64_t in_features = K_of_x ? *K_of_x : filled ? entries - rows : rows;
  const int64_t K = filled ? rows : in_features;
  const int64_t N = N_of_grad ? *N_of_grad : scales.size(lead + 1);
  const int64_t G = scales.size(lead);
  check_fills_words(op, "K", in_features, format);
  check_fills_words(op, {"N", part}, N, format);
  if (qweight.size(lead) != K * bits / 32 || qweight.size(lead + 1) != N) {
    check_shape(op, {"qweight", part}, qweight, "(K*bits/32, N)", K * bits / 32, N,
                "K=" + str(K) + ", bits=" + str(bits));
  }
  if (G <= 0) {
    refuse(op, Name{"scales", part}.str() + " must have at least one group (row); got " + shape_of(scales, lead));
  }
  if (scales.size(lead + 1) != N) check_shape(op, {"scales", part}, scales, "(G, N)", G, N, "N=" + str(N));
  if (qzeros.size(lead) != G || qzeros.size(lead + 1) != N * bits / 32) {
    check_shape(op, {"qzeros", part}, qzeros, "(G, N*bits/32)", G, N * bits / 32,
                "G=" + str(G) + ", N=" + str(N) + ", bits=" + str(bits));
  }

  if (entries != 0 && entries != K && !filled) {
    refuse(op, Name{"g_idx", order_part}.str() + " (" +
                   (use_exllama ? "the permutation argsort(g_idx)" : "the group of each row") +
                   ", as use_exllama=" + (use_exllama ? "True" : "False") + ") must be empty or have shape (K,) = (" +
                   str(K) + ",)" + (use_exllama ? ", or (rows of qweight + K,) if its groups are filled" : "") +
                   "; got (" + str(entries) + ",)");
  }
  if (group_size < 0) refuse(op, "group_size must be at least 1, or 0 for K / G; got " + str(group_size));
  if (!use_exllama && entries != 0) return {K, N, G, in_features, filled};
  if (group_size != 0) {
    const int64_t groups = (K - 1) / group_size + 1;
    if (groups != G && !(filled && groups < G)) {
      refuse(op, Name{"scales", part}.str() + " must have G = ceil(K / group_size) = " + str(groups) +
                     " rows for K=" + str(K) + ", group_size=" + str(group_size) + "; got " + str(G));
    }
  } else if (K % G != 0) {
    refuse(op, "group_size=0 means K / G, which must be whole; got K=" + str(K) + ", " + Name{"G", part}.str() + "=" +
                   str(G) + " (say the group_size of a weight whose last group is partial)");
  }
  return {K, N, G, in_features, filled};
}

// What gptq_shuffle and gptq_unshuffle share. Returns K.
int64_t check_reordering(const char* op, const Tensor& qweight, const Tensor& q_perm, int64_t bit) {
  const Format& format = check_bits(op, bit);
  check_tensor(op, "qweight", qweight, 2, {kInt32}, qweight);
  check_tensor(op, "q_perm", q_perm, 1, {kInt32}, qweight);
  const int64_t K = check_rows(op, qweight, format);
  if (q_perm.size(0) != 0 && q_perm.size(0) != K) {
    refuse(op, "q_perm must be empty or have shape (K,) = (" + str(K) + ",) for qweight of shape " + shape_of(qweight) +
                   ", bits=" + str(bit) + "; got (" + str(q_perm.size(0)) + ",)");
  }
  return K;
}

}  // namespace

Shape check_gptq_gemm(const Tensor& x, const WeightArguments& weight) {
  check_float_tensor("gptq_gemm", "x", x, x);
  const int64_t K = x.size(1);
  return check_weight("gptq_gemm", {weight.qweight, weight.qzeros, weight.scales}, weight.options, x, &K, nullptr);
}

std::vector<Shape> check_gptq_gemm_multi(const Tensor& x, const PartsArguments& parts) {
  constexpr const char* kOp = "gptq_gemm_multi";
  check_float_tensor(kOp, "x", x, x);
  const size_t count = parts.qweight.size();
  if (count == 0 || count != parts.qzeros.size() || count != parts.scales.size()) {
    const int64_t lengths[] = {static_cast<int64_t>(count), static_cast<int64_t>(parts.qzeros.size()),
                               static_cast<int64_t>(parts.scales.size())};
    refuse(kOp, "qweight, qzeros and scales must have one entry for each part, at least 1; got " + tuple(lengths, 3));
  }
  const int64_t K = x.size(1);
  std::vector<Shape> shapes;
  shapes.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto part = static_cast<int64_t>(i);
    const WeightTensors tensors{parts.qweight[i], parts.qzeros[i], parts.scales[i], part};
    const Shape shape = check_weight(kOp, tensors, parts.options, x, &K, nullptr);
    if (i > 0 && shape.G != shapes[0].G) {
      refuse(kOp, Name{"scales", part}.str() + " must have as many groups (rows) as scales[0], " + str(shapes[0].G) +
                      "; got " + str(shape.G));
    }
    shapes.push_back(shape);
  }
  return shapes;
}

Shape check_gptq_gemm_dx(const Tensor& grad, const WeightArguments& weight) {
  check_float_tensor("gptq_gemm_dx", "grad", grad, grad);
  const int64_t N = grad.size(1);
  return check_weight("gptq_gemm_dx", {weight.qweight, weight.qzeros, weight.scales}, weight.options, grad, nullptr,
                      &N);
}

namespace {

// The rules that make the weights of all experts like that of the first, and those of the first.
Shape check_experts(const char* op, const ExpertsArguments& experts, const Tensor& first, const int64_t* K_of_x,
                    const int64_t* N_of_grad) {
  const auto& [qweight, qzeros, scales, options, offsets] = experts;
  const Tensor& g_idx = options.g_idx;
  check_bits(op, options.bit);
  check_tensor(op, "qweight", qweight, 3, {kInt32}, first);
  check_tensor(op, "qzeros", qzeros, 3, {kInt32}, first);
  check_float_tensor(op, "scales", scales, first, 3);
  const bool none = g_idx.defined() && g_idx.dim() == 1 && g_idx.size(0) == 0;
  check_tensor(op, "g_idx", g_idx, none ? 1 : 2, {kInt32}, first);
  check_tensor(op, "expert_offsets", offsets, 1, {kInt32}, first);
  const int64_t E = qweight.size(0);
  if (E <= 0) refuse(op, "qweight must have at least one expert; got shape " + shape_of(qweight));
  const auto check_entries = [&](const char* name, const Tensor& stack) {
    if (stack.size(0) == E) return;
    refuse(op, std::string(name) + " must have an entry for each of the " + str(E) + " experts of qweight; got " +
                   str(stack.size(0)));
  };
  check_entries("qzeros", qzeros);
  check_entries("scales", scales);
  if (!none) check_entries("g_idx", g_idx);
  if (offsets.size(0) != E + 1) {
    refuse(op, "expert_offsets must have shape (E + 1,) = (" + str(E + 1) + ",) for the " + str(E) +
                   " experts of qweight; got (" + str(offsets.size(0)) + ",)");
  }
  return check_weight(op, {qweight, qzeros, scales, 0, 1, none ? -1 : 0}, options, first, K_of_x, N_of_grad);
}

}  // namespace

Shape check_gptq_moe_gemm(const Tensor& x, const ExpertsArguments& experts) {
  check_float_tensor("gptq_moe_gemm", "x", x, x);
  const int64_t K = x.size(1);
  return check_experts("gptq_moe_gemm", experts, x, &K, nullptr);
}

Shape check_gptq_moe_gemm_dx(const Tensor& grad, const ExpertsArguments& experts) {
  check_float_tensor("gptq_moe_gemm_dx", "grad", grad, grad);
  const int64_t N = grad.size(1);
  return check_experts("gptq_moe_gemm_dx", experts, grad, nullptr, &N);
}

Shape check_gptq_dequantize(const WeightArguments& weight) {
  return check_weight("gptq_dequantize", {weight.qweight, weight.qzeros, weight.scales}, weight.options, weight.qweight,
                      nullptr, nullptr);
}

int64_t check_gptq_shuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit) {
  const int64_t K = check_reordering("gptq_shuffle", qweight, q_perm, bit);
  if (q_perm.size(0) != 0 && overlap(qweight, q_perm)) {
    refuse("gptq_shuffle", "q_perm must share no memory with qweight, which is overwritten; got tensors that overlap");
  }
  return K;
}

int64_t check_gptq_unshuffle(const Tensor& qweight, const Tensor& q_perm, int64_t bit) {
  return check_reordering("gptq_unshuffle", qweight, q_perm, bit);
}

void check_index_range(const char* op, const std::string& name, const int32_t* index, int64_t entries, int64_t limit) {
  // Without a branch, so that the compiler makes vectors of it: negative entries are large when unsigned.
  const uint32_t bound = limit > INT32_MAX ? uint32_t{1} << 31 : static_cast<uint32_t>(limit);
  uint32_t outside = 0;
  for (int64_t i = 0; i < entries; ++i) outside |= static_cast<uint32_t>(index[i]) >= bound;
  if (!outside) return;
  int64_t at = 0;
  while (static_cast<uint32_t>(index[at]) < bound) ++at;
  refuse(op, name + " must have values in [0, " + str(limit) + "); got " + str(index[at]) + " at index " + str(at));
}

namespace {

// Whether the two lists of a filled weight agree, as fast as a call needs it: the first loop becomes vectors.
bool lists_agree(const int32_t* named, const int32_t* places, int64_t K, int64_t in_features) {
  uint32_t outside = 0;
  int64_t rows = 0;
  for (int64_t i = 0; i < K; ++i) {
    outside |= static_cast<uint32_t>(named[i]) + 1 > static_cast<uint32_t>(in_features);
    rows += named[i] >= 0;
  }
  // Where each row has a place, so many name one each.
  bool agree = !outside && rows == in_features;
  for (int64_t row = 0; row < in_features; ++row) {
    const bool inside = static_cast<uint32_t>(places[row]) < static_cast<uint32_t>(K);
    agree &= inside && named[inside ? places[row] : 0] == row;
  }
  return agree;
}

}  // namespace

void check_filled_order(const char* op, const std::string& name, const int32_t* named, const int32_t* places, int64_t K,
                        int64_t in_features) {
  if (lists_agree(named, places, K, in_features)) return;
  for (int64_t i = 0; i < K; ++i) {
    if (named[i] >= -1 && named[i] < in_features) continue;
    refuse(op, name + " must have values in [-1, " + str(in_features) + ") for the " + str(K) +
                   " rows of qweight; got " + str(named[i]) + " at index " + str(i));
  }
  for (int64_t row = 0; row < in_features; ++row) {
    if (places[row] >= 0 && places[row] < K && named[places[row]] == row) continue;
    refuse(op, name + " must say at index " + str(K + row) + " where " + str(row) + " stands among its first " +
                   str(K) + " values; got " + str(places[row]));
  }
  for (int64_t i = 0; i < K; ++i) {
    if (named[i] < 0 || places[named[i]] == i) continue;
    refuse(op, name + " must name a row of W once; got " + str(named[i]) + " at index " + str(places[named[i]]) +
                   " and at index " + str(i));
  }
}

void check_permutation(const char* op, const std::string& name, const int32_t* index, int64_t entries, uint8_t* seen) {
  std::memset(seen, 0, static_cast<size_t>(entries));
  for (int64_t i = 0; i < entries; ++i) {
    if (!seen[index[i]]) {
      seen[index[i]] = 1;
      continue;
    }
    const int64_t first = std::find(index, index + i, index[i]) - index;
    refuse(op, name + " must be a permutation; got " + str(index[i]) + " at index " + str(first) + " and at index " +
                   str(i));
  }
}

void check_expert_offsets(const char* op, const int32_t* offsets, int64_t count, int64_t M) {
  int64_t least = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i] < least || offsets[i] > M) {
      refuse(op, "expert_offsets must not decrease, from 0 or more to the " + str(M) + " rows or fewer; got " +
                     str(offsets[i]) + " at index " + str(i));
    }
    least = offsets[i];
  }
}

}  // namespace exllama::bindings
