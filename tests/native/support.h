// What the native tests and the benchmark share: a random weight, plain threads, float conversions written apart.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/workers.h"

namespace native {

using namespace exllama::cpu;

// Threads started anew for each call: slow, and the easiest thing for ThreadSanitizer to judge.
struct Threads {
  static void run(void* self, int64_t tasks, Parallel::Body body, void* context) {
    const int count = *static_cast<int*>(self);
    std::atomic<int64_t> next{0};
    const auto work = [&](int32_t worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(context, task, worker);
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < count; ++i) threads.emplace_back(work, i);
    work(0);
    for (std::thread& thread : threads) thread.join();
  }
};

inline double decode(const void* values, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  const double sign = bits & 0x8000 ? -1 : 1;
  const int fraction_bits = dtype == DType::kFloat16 ? 10 : 7, bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  if (exponent == 2 * bias + 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

// The nearest value of the dtype, by search among its neighbours; slow and obvious.
inline void encode(double value, void* values, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[i] = static_cast<float>(value);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(values) + i;
  const uint16_t infinity = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  if (std::isnan(value)) {
    *out = infinity | 1 << 6;
    return;
  }
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  uint16_t low = 0, high = infinity;  // magnitudes are ordered as integers
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (decode(&middle, dtype, 0) <= std::fabs(value) ? low : high) = middle;
  }
  const uint16_t below = static_cast<uint16_t>(infinity - 1);
  const double step =
      decode(&below, dtype, 0) - decode(std::array<uint16_t, 1>{static_cast<uint16_t>(below - 1)}.data(), dtype, 0);
  const double up = high == infinity ? decode(&below, dtype, 0) + step : decode(&high, dtype, 0);
  const double middle = (decode(&low, dtype, 0) + up) / 2;
  const bool take_high = std::fabs(value) > middle || (std::fabs(value) == middle && low % 2);
  *out = static_cast<uint16_t>(sign | (take_high ? high : low));
}

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

enum class Order { kShuffled, kPermuted, kCheckpoint, kRawGroups };

// A random weight in one of the four forms that the ops take, with W as the checkpoint has it, in double.
struct RandomWeight {
  int64_t K, N, G, group_size;
  int bits;
  std::vector<uint32_t> checkpoint, words, zeros;
  std::vector<uint8_t> scales;
  std::vector<int32_t> rows;  // perm or raw groups
  std::vector<double> W;
  std::vector<int64_t> group_of;  // of the checkpoint's rows
  Weight view;

  RandomWeight(std::mt19937& random, int64_t rows_of_W, int64_t columns, int width, int64_t rows_of_group, Order order,
               bool v2, DType scales_dtype)
      : K(rows_of_W),
        N(columns),
        G((rows_of_W + rows_of_group - 1) / rows_of_group),
        group_size(rows_of_group),
        bits(width) {
    std::vector<int32_t> q(K * N), z(G * N);
    for (int32_t& value : q) value = random() % (1 << bits);
    // Stored zero points reach the ends of their range, which v1 makes 2^bits.
    for (int32_t& value : z) value = random() % (1 << bits);
    scales.resize(G * N * size_of(scales_dtype));
    for (int64_t i = 0; i < G * N; ++i) encode(0.01 + 0.02 * (random() % 1000) / 1000, scales.data(), scales_dtype, i);

    group_of.resize(K);
    for (int64_t k = 0; k < K; ++k) group_of[k] = k / group_size;
    if (order == Order::kPermuted) std::shuffle(group_of.begin(), group_of.end(), random);
    if (order == Order::kRawGroups) {
      for (int64_t& group : group_of) group = random() % G;
      rows.assign(group_of.begin(), group_of.end());
    }
    checkpoint = pack(q, K, N);
    words = checkpoint;
    if (order == Order::kPermuted) {
      rows.resize(K);
      std::iota(rows.begin(), rows.end(), 0);
      std::stable_sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return group_of[a] < group_of[b]; });
    }
    std::vector<int32_t> transposed(N * G);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t n = 0; n < N; ++n) transposed[n * G + g] = z[g * N + n];
    }
    const std::vector<uint32_t> packed = pack(transposed, N, G);
    const int64_t zero_words = N * bits / 32;
    zeros.resize(G * zero_words);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t w = 0; w < zero_words; ++w) zeros[g * zero_words + w] = packed[w * G + g];
    }
    W.resize(K * N);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t g = group_of[k];
        W[k * N + n] = decode(scales.data(), scales_dtype, g * N + n) * (q[k * N + n] - z[g * N + n] - (v2 ? 0 : 1));
      }
    }
    const bool shuffled = order == Order::kShuffled || order == Order::kPermuted;
    view = {words.data(),
            zeros.data(),
            scales.data(),
            scales_dtype,
            rows.empty() ? nullptr : rows.data(),
            K,
            N,
            G,
            group_size,
            bits,
            shuffled,
            v2 ? 0 : 1,
            K};
    if (shuffled) {
      int threads = 1;
      std::vector<char> copy(shuffle_workspace_bytes(K, bits, threads));
      shuffle(words.data(), view.row_order, K, N, bits, copy.data(), {Threads::run, &threads, threads});
    }
  }

  RandomWeight(const RandomWeight&) = delete;

  // Row k of the stored order is this row of the checkpoint.
  int64_t stored_row(int64_t k) const { return view.perm() ? view.perm()[k] : k; }

 private:
  // Bit b of value k of a column lies at bit (k * bits + b) of the column's stream.
  std::vector<uint32_t> pack(const std::vector<int32_t>& values, int64_t rows_of_values, int64_t columns) const {
    std::vector<uint32_t> result(rows_of_values * bits / 32 * columns);
    for (int64_t k = 0; k < rows_of_values; ++k) {
      for (int64_t n = 0; n < columns; ++n) {
        for (int b = 0; b < bits; ++b) {
          const int64_t position = k * bits + b;
          const uint32_t bit = static_cast<uint32_t>(values[k * columns + n]) >> b & 1;
          result[position / 32 * columns + n] |= bit << (position % 32);
        }
      }
    }
    return result;
  }
};

// Memory of exactly this many bytes from the heap, aligned for a workspace and poisoned.
struct Workspace {
  explicit Workspace(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
    std::memset(data, 0xff, (bytes + 63) / 64 * 64 + 64);
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  void* data;
};

inline std::vector<uint8_t> run_gemm(const RandomWeight& weight, const std::vector<uint8_t>& x, DType dtype, int64_t M,
                                     Precision precision, int threads) {
  std::vector<uint8_t> out(M * weight.N * size_of(dtype), 0xff);
  const Workspace workspace(gemm_workspace_bytes(&weight.view, 1, M, precision, threads));
  gemm(&weight.view, 1, x.data(), dtype, M, out.data(), precision, workspace.data, {Threads::run, &threads, threads});
  return out;
}

// The weight and itself again, side by side, on the workers that a process has.
inline std::vector<uint8_t> run_gemm_of_two(const RandomWeight& weight, const std::vector<uint8_t>& x, DType dtype,
                                            int64_t M, Precision precision, int threads) {
  const Weight parts[] = {weight.view, weight.view};
  std::vector<uint8_t> out(2 * M * weight.N * size_of(dtype), 0xff);
  const Workspace workspace(gemm_workspace_bytes(parts, 2, M, precision, threads));
  const auto run = [](void* self, int64_t tasks, Parallel::Body body, void* context) {
    Workers::of_process().run(tasks, body, context, *static_cast<int*>(self));
  };
  const auto ready = [](void*, int32_t wanted) { return Workers::of_process().ready(wanted); };
  gemm(parts, 2, x.data(), dtype, M, out.data(), precision, workspace.data, {run, &threads, threads, ready});
  return out;
}

// The rows of x as those of three experts of the same weight, some of which may have none.
inline std::vector<Expert> three_experts(const RandomWeight& weight, int64_t M) {
  std::vector<Expert> experts;
  const int64_t ends[] = {0, M / 8, M / 8 + (M > 1), M};
  for (int i = 0; i < 3; ++i) {
    if (ends[i] < ends[i + 1]) experts.push_back({weight.view, ends[i], ends[i + 1] - ends[i]});
  }
  return experts;
}

inline std::vector<uint8_t> run_gemm_of_three_experts(const RandomWeight& weight, const std::vector<uint8_t>& x,
                                                      DType dtype, int64_t M, Precision precision, int threads) {
  const std::vector<Expert> experts = three_experts(weight, M);
  const auto count = static_cast<int64_t>(experts.size());
  std::vector<uint8_t> out(M * weight.N * size_of(dtype), 0xff);
  const Workspace workspace(moe_gemm_workspace_bytes(experts.data(), count, precision, threads));
  moe_gemm(experts.data(), count, x.data(), dtype, out.data(), precision, workspace.data,
           {Threads::run, &threads, threads});
  return out;
}

}  // namespace native
