// Tests the CPU kernels against sums in double and against themselves, without torch:
//
//   g++ -O2 -std=c++17 -pthread -ffp-contract=off -Icsrc tests/native/test_cpu.cpp $(find csrc/cpu -name "*.cpp")
//   ./a.out [extent=all] [width ...]
//
// pytest also runs it with -fsanitize=address,undefined and -fsanitize=thread. The extent `quick` takes fewer shapes, and
// `sampled` takes only a third of their products. The widths are all by default.
#include <algorithm>
#include <array>
#include <iterator>
#include <string>

#include "support.h"

using namespace native;

namespace {

int failures = 0;
long checks = 0;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 30) std::printf("FAIL %s\n", what.c_str());
}

std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (const char* const* name = isa_names(); *name; ++name) {
    if (isa_available(*name)) names.push_back(*name);
  }
  return names;
}

const char* name_of(DType dtype) {
  return dtype == DType::kFloat16 ? "fp16" : dtype == DType::kBFloat16 ? "bf16" : "fp32";
}
const char* name_of(Precision precision) {
  return precision == Precision::kHighest ? "highest" : precision == Precision::kHigh ? "high" : "medium";
}

// kHuge: sums of groups overflow in float32, and some results.
enum class Values { kGaussian, kOutlier, kOneHot, kTiny, kNotFinite, kHuge };
constexpr int kValues = 6;

std::vector<uint8_t> make_x(std::mt19937& random, int64_t M, int64_t K, DType dtype, Values values) {
  std::normal_distribution<double> normal;
  std::vector<uint8_t> x(M * K * size_of(dtype));
  for (int64_t m = 0; m < M; ++m) {
    const int64_t hot = random() % K;
    for (int64_t k = 0; k < K; ++k) {
      double value = normal(random);
      if (values == Values::kOutlier && random() % 60 == 0) value *= 300;
      if (values == Values::kOneHot) value = k == hot ? value : 0;
      if (values == Values::kTiny) value *= dtype == DType::kFloat16 ? 0x1p-22 : 0x1p-140;
      if (values == Values::kHuge && dtype != DType::kFloat16) value *= 0x1p122;
      if (values == Values::kNotFinite && k == hot) value = m % 2 ? NAN : INFINITY;
      encode(value, x.data(), dtype, m * K + k);
    }
  }
  return x;
}

struct Case {
  const RandomWeight& weight;
  const std::vector<uint8_t>& x;
  DType dtype;
  int64_t M;
  Precision precision;
  std::string text;
};

// Whether a result is one of a sum that differs by `bound` from the exact one.
bool is_within(double got, double sum, double bound, DType dtype) {
  const auto rounded = [dtype](double value) {
    uint32_t result;
    encode(static_cast<float>(value), &result, dtype, 0);
    return decode(&result, dtype, 0);
  };
  return rounded(sum - bound) <= got && got <= rounded(sum + bound);
}

// The bound of the class, per element: csrc/cpu/gemm/ says what is rounded where.
void check_values(const Case& c, const std::vector<uint8_t>& out) {
  const RandomWeight& w = c.weight;
  const bool integers = c.precision != Precision::kHighest && (!w.view.g_idx());
  std::vector<double> sum(w.N), sum_abs(w.N), limbs(w.N), norm(w.N), block_abs(w.N);
  for (int64_t m = 0; m < c.M; ++m) {
    std::fill(sum.begin(), sum.end(), 0);
    std::fill(sum_abs.begin(), sum_abs.end(), 0);
    std::fill(limbs.begin(), limbs.end(), 0);
    int64_t blocks = 0;
    for (int64_t begin = 0; begin < w.K; ++blocks) {
      const int64_t group_end = w.view.g_idx() ? w.K : (begin / w.group_size + 1) * w.group_size;
      const int64_t end = std::min({begin + 128, group_end, w.K});
      double x_norm = 0, largest = 0, total = 0;
      std::fill(norm.begin(), norm.end(), 0);
      std::fill(block_abs.begin(), block_abs.end(), 0);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = w.stored_row(k);
        const double x = decode(c.x.data(), c.dtype, m * w.K + row);
        x_norm += x * x;
        largest = std::max(largest, std::fabs(x));
        total += std::fabs(x);
        for (int64_t n = 0; n < w.N; ++n) {
          const double value = w.W[row * w.N + n];
          sum[n] += x * value;
          block_abs[n] += std::fabs(x * value);
          norm[n] += value * value;
        }
      }
      const bool outlier = largest * (end - begin) > 16 * total;
      for (int64_t n = 0; n < w.N; ++n) {
        sum_abs[n] += block_abs[n];
        if (!integers) continue;
        if (c.precision == Precision::kMedium) {
          // Half a unit, 128 / 127 of 2^-7 of the largest at most.
          limbs[n] += 0x1.03p-7 * largest * std::sqrt(end - begin) * std::sqrt(norm[n]);
        } else {
          limbs[n] += 0x1p-11 * (outlier ? block_abs[n] : std::sqrt(x_norm) * std::sqrt(norm[n]));
        }
      }
      begin = end;
    }
    for (int64_t n = 0; n < w.N; ++n) {
      const double got = decode(out.data(), c.dtype, m * w.N + n);
      if (!std::isfinite(sum[n])) {
        expect(std::isnan(sum[n]) ? std::isnan(got) : got == sum[n], c.text + " not finite");
        continue;
      }
      // 128 rows in a chain, the blocks, and the product: the float sums of any class.
      const double gamma = (128 + 2 * blocks + 1) * 0x1p-24;
      const double bound = limbs[n] + gamma * sum_abs[n] + w.K * 0x1p-149;
      if (!is_within(got, sum[n], bound, c.dtype)) {
        expect(false, c.text + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " got " + std::to_string(got) +
                          " want " + std::to_string(sum[n]) + " bound " + std::to_string(bound));
        return;
      }
    }
  }
  expect(true, c.text);
}

bool same(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, DType dtype) {
  if (a == b) return true;
  for (size_t i = 0; i < a.size() / size_of(dtype); ++i) {
    const double left = decode(a.data(), dtype, i), right = decode(b.data(), dtype, i);
    if (std::isnan(left) && std::isnan(right)) continue;
    if (left != right || std::signbit(left) != std::signbit(right)) return false;
  }
  return true;
}

void test_gemm(std::mt19937& random, const RandomWeight& weight, DType dtype, Precision precision, Values values,
               int64_t M, const std::string& text) {
  const std::vector<uint8_t> x = make_x(random, M, weight.K, dtype, values);
  const size_t row = weight.K * size_of(dtype), out_row = weight.N * size_of(dtype);
  std::vector<uint8_t> first;
  for (const char* isa : isas()) {
    use_isa(isa);
    const Case c{weight,
                 x,
                 dtype,
                 M,
                 precision,
                 text + " " + isa + " " + name_of(dtype) + " " + name_of(precision) + " values " +
                     std::to_string(static_cast<int>(values)) + " M=" + std::to_string(M)};
    const std::vector<uint8_t> out = run_gemm(weight, x, dtype, M, precision, 1);
    if (first.empty()) {
      first = out;
      check_values(c, out);
    }
    expect(same(first, out, dtype), c.text + " differs from " + isas()[0]);
    expect(same(out, run_gemm(weight, x, dtype, M, precision, 3), dtype), c.text + " differs with 3 threads");
    std::vector<uint8_t> twice;
    for (int64_t m = 0; m < M; ++m) {
      const auto begin = out.begin() + m * out_row;
      for (int part = 0; part < 2; ++part) twice.insert(twice.end(), begin, begin + out_row);
    }
    expect(same(twice, run_gemm_of_two(weight, x, dtype, M, precision, 3), dtype), c.text + " differs side by side");
    expect(same(out, run_gemm_of_three_experts(weight, x, dtype, M, precision, 3), dtype),
           c.text + " differs by experts");
    for (int64_t m : {int64_t{0}, M / 2, M - 1}) {
      const std::vector<uint8_t> one(x.begin() + m * row, x.begin() + (m + 1) * row);
      const std::vector<uint8_t> alone = run_gemm(weight, one, dtype, 1, precision, 1);
      const std::vector<uint8_t> batched(out.begin() + m * out_row, out.begin() + (m + 1) * out_row);
      expect(same(alone, batched, dtype), c.text + " row differs alone");
    }
  }
}

void test_dequantize(const RandomWeight& weight, const std::string& text) {
  const DType dtype = weight.view.scales_dtype;
  for (const char* isa : isas()) {
    use_isa(isa);
    int threads = 2;
    std::vector<uint8_t> out(weight.K * weight.N * size_of(dtype)), want(out);
    dequantize(weight.view, out.data(), {Threads::run, &threads, threads});
    for (int64_t i = 0; i < weight.K * weight.N; ++i) encode(weight.W[i], want.data(), dtype, i);
    expect(same(out, want, dtype), text + " dequantize " + isa);
  }
}

void test_unshuffle(const RandomWeight& weight, const std::string& text) {
  int threads = 2;
  std::vector<uint32_t> out(weight.words.size());
  const Workspace workspace(shuffle_workspace_bytes(weight.K, weight.bits, threads));
  unshuffle(weight.words.data(), weight.view.row_order, weight.K, weight.N, weight.bits, out.data(), workspace.data,
            {Threads::run, &threads, threads});
  expect(out == weight.checkpoint, text + " unshuffle");
}

void test_dx(std::mt19937& random, const RandomWeight& weight, DType dtype, int64_t M, Values values,
             const std::string& text) {
  const std::vector<uint8_t> grad = make_x(random, M, weight.N, dtype, values);
  for (const char* isa : isas()) {
    use_isa(isa);
    std::vector<uint8_t> one_thread;
    for (int threads : {1, 3}) {
      std::vector<uint8_t> dx(M * weight.K * size_of(dtype), 0xff);
      const Workspace workspace(gemm_dx_workspace_bytes(weight.view, M, threads));
      gemm_dx(weight.view, grad.data(), dtype, M, dx.data(), workspace.data, {Threads::run, &threads, threads});
      if (threads == 1) one_thread = dx;
      expect(dx == one_thread, text + " dx threads " + isa);
      const std::vector<Expert> experts = three_experts(weight, M);
      const auto count = static_cast<int64_t>(experts.size());
      const Workspace of_experts(moe_gemm_dx_workspace_bytes(experts.data(), count, threads));
      std::fill(dx.begin(), dx.end(), uint8_t{0xff});
      moe_gemm_dx(experts.data(), count, grad.data(), dtype, dx.data(), of_experts.data,
                  {Threads::run, &threads, threads});
      expect(dx == one_thread, text + " dx of experts " + isa);
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < weight.K; ++k) {
        double sum = 0, sum_abs = 0;
        for (int64_t n = 0; n < weight.N; ++n) {
          const double product = decode(grad.data(), dtype, m * weight.N + n) * weight.W[k * weight.N + n];
          sum += product;
          sum_abs += std::fabs(product);
        }
        const double got = decode(one_thread.data(), dtype, m * weight.K + k);
        const double bound = (weight.N / 16 + 6) * 0x1p-24 * sum_abs;
        if (!is_within(got, sum, bound, dtype)) {
          expect(false, text + " dx " + isa + " m=" + std::to_string(m) + " k=" + std::to_string(k));
          return;
        }
      }
    }
    expect(true, "");
  }
}

// The words of docs/format.md.
void test_golden() {
  const struct {
    int bits, words;
    uint32_t checkpoint[3], shuffled[3];
  } golden[] = {
      {4, 1, {0x87654321}, {0x86427531}},
      {8, 1, {0xFE807F01}, {0xFE807F01}},
      {2, 1, {0xF2849F39}, {0xC9B2E07D}},
      {3, 3, {0x911F58D1, 0xC688FAC7, 0xCC14E5DE}, {0x21A29F59, 0xB3EBA1A6, 0x8535177C}},
  };
  int threads = 1;
  const Parallel parallel{Threads::run, &threads, threads};
  for (const auto& g : golden) {
    uint32_t words[3] = {g.checkpoint[0], g.checkpoint[1], g.checkpoint[2]}, back[3] = {};
    const int64_t K = g.words * 32 / g.bits;
    const Workspace workspace(shuffle_workspace_bytes(K, g.bits, threads));
    shuffle(words, nullptr, K, 1, g.bits, workspace.data, parallel);
    unshuffle(words, nullptr, K, 1, g.bits, back, workspace.data, parallel);
    for (int w = 0; w < g.words; ++w) {
      expect(words[w] == g.shuffled[w], "golden shuffle");
      expect(back[w] == g.checkpoint[w], "golden unshuffle");
    }
  }
}

// The largest sums of bytes: x of 127 or -127 times the largest q, with the zero points at both ends of their range. What
// comes out is exact.
void test_largest_sums(int bits) {
  constexpr int64_t K = 256, N = 96;
  const std::vector<uint32_t> words(K * bits / 32 * N, ~0u);
  const std::vector<float> scales(N, 1);
  int threads = 1;
  for (const bool v2 : {true, false}) {
    const std::vector<uint32_t> zeros(N * bits / 32, v2 ? 0 : ~0u);
    const float centered = v2 ? (1 << bits) - 1 : -1;
    const Weight weight{
        words.data(), zeros.data(), scales.data(), DType::kFloat32, nullptr, K, N, 1, K, bits, true, v2 ? 0 : 1, K};
    for (const int64_t M : {1, 8, 14}) {
      std::vector<float> x(M * K), out(M * N);
      for (int64_t i = 0; i < M * K; ++i) x[i] = i / K % 2 ? -127 : 127;
      for (const char* isa : isas()) {
        use_isa(isa);
        const Workspace workspace(gemm_workspace_bytes(&weight, 1, M, Precision::kMedium, threads));
        gemm(&weight, 1, x.data(), DType::kFloat32, M, out.data(), Precision::kMedium, workspace.data,
             {Threads::run, &threads, threads});
        const std::string text = std::to_string(bits) + " bits, largest sums " + isa + " M=" + std::to_string(M);
        for (int64_t i = 0; i < M * N; ++i) expect(out[i] == x[i / N * K] * K * centered, text);
      }
    }
  }
}

// The work of a test stays bounded: double sums over K * N.
struct Shape {
  int64_t K, N, group_size;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string extent = argc > 1 ? argv[1] : "all";
  const bool sampled = extent == "sampled", quick = sampled || extent == "quick";
  std::mt19937 random(7);
  test_golden();
  std::vector<int> widths;
  for (int i = 2; i < argc; ++i) widths.push_back(std::atoi(argv[i]));
  if (widths.empty()) widths.assign(std::begin(exllama::layout::kWidths), std::end(exllama::layout::kWidths));
  for (int bits : widths) {
    test_largest_sums(bits);
    const int64_t unit = exllama::layout::block_values(bits);
    std::vector<Shape> shapes = {{320, 96, 128}, {96, 544, 32}, {unit * 3, unit, unit}, {unit * 9, unit * 5, 7}};
    if (!quick) {
      shapes.insert(
          shapes.end(),
          {{576, 672, 128}, {unit, unit * 3, 4096}, {1056, 32, 1056}, {640, 160, 192}, {unit * 2, unit * 37, 1}});
    }
    for (const Shape& shape : shapes) {
      for (Order order : {Order::kShuffled, Order::kPermuted, Order::kCheckpoint, Order::kRawGroups}) {
        const bool v2 = random() % 2;
        const DType scales = static_cast<DType>(random() % 3);
        const RandomWeight weight(random, shape.K, shape.N, bits, shape.group_size, order, v2, scales);
        const std::string text = std::to_string(bits) + " bits K=" + std::to_string(shape.K) +
                                 " N=" + std::to_string(shape.N) + " group " + std::to_string(shape.group_size) +
                                 " order " + std::to_string(static_cast<int>(order)) + (v2 ? " v2" : " v1") +
                                 " scales " + name_of(scales);
        test_dequantize(weight, text);
        if (weight.view.shuffled) test_unshuffle(weight, text);
        const Values values_of_grad = random() % 2 ? Values::kGaussian : Values::kHuge;
        test_dx(random, weight, static_cast<DType>(random() % 3), random() % 2 ? 3 : 6, values_of_grad, text);
        for (Precision precision : {Precision::kHighest, Precision::kHigh, Precision::kMedium}) {
          for (int values = sampled ? random() % 3 : 0; values < kValues; values += sampled ? 3 : 1) {
            const DType dtype = static_cast<DType>(random() % 3);
            // Up to 8 rows are multiplied from the words, up to 64 from the words of a panel, and more by panels.
            const int64_t rows[] = {1, 2, 4, 8, 9, 13, 16, 67, 3, 5, 7, 11, 12, 29, 64};
            const int64_t M = quick ? rows[random() % 8] : rows[random() % std::size(rows)];
            test_gemm(random, weight, dtype, precision, static_cast<Values>(values), M, text);
          }
        }
        run_gemm(weight, {}, DType::kFloat16, 0, Precision::kHigh, 2);
      }
    }
  }
  std::printf("%ld checks, %d failures on", checks, failures);
  for (const char* isa : isas()) std::printf(" %s", isa);
  std::printf("\n");
  return failures != 0;
}
