// Times gemm beside the limits of the machine, in turns and without torch:
//
//   g++ -O2 -std=c++17 -pthread -ffp-contract=off -Icsrc tests/native/bench_cpu.cpp $(find csrc/cpu -name "*.cpp")
//   ./a.out [bits=4] [group=128] [K=4096] [N=4096] [threads=1] [M, default 1 4 16 64 256]
//
// It prints the median time for each M, and percent of two limits: reading DRAM, and the dot product peak of the class.
// Cores are shared and their clock moves, so each run stands between two measurements of the limits. The percentages are
// medians of these ratios, and the best value of a limit stands in brackets.
#include <ctime>
#include <string>

#include <immintrin.h>

#include "support.h"

using namespace native;

namespace {

// Wall-clock time; with one thread, the time that it had a core, so that other work on the machine does not count.
bool one_thread = true;

double now() {
  timespec time;
  clock_gettime(one_thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Threads that spin for their next work, as an OpenMP pool does within its block time.
class Pool {
 public:
  explicit Pool(int count) : count_(count) {
    for (int i = 1; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    stop_ = true;
    generation_.fetch_add(1);
    for (std::thread& thread : threads_) thread.join();
  }
  Parallel parallel() { return {run, this, count_}; }

 private:
  static void run(void* self, int64_t tasks, Parallel::Body body, void* context) {
    Pool& pool = *static_cast<Pool*>(self);
    pool.tasks_ = tasks;
    pool.body_ = body;
    pool.context_ = context;
    pool.next_ = 0;
    pool.working_ = pool.count_ - 1;
    pool.generation_.fetch_add(1);
    pool.work(0);
    while (pool.working_.load() > 0) _mm_pause();
  }
  void work(int32_t worker) {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) body_(context_, task, worker);
  }
  void serve(int32_t worker) {
    for (int seen = 0;;) {
      while (generation_.load() == seen) _mm_pause();
      ++seen;
      if (stop_) return;
      work(worker);
      working_.fetch_sub(1);
    }
  }

  int count_;
  std::vector<std::thread> threads_;
  std::atomic<int> generation_{0}, working_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  int64_t tasks_ = 0;
  Parallel::Body body_ = nullptr;
  void* context_ = nullptr;
};

// The data begins on a cache line, as torch allocates it.
template <typename T>
const T* aligned(const std::vector<T>& values) {
  return reinterpret_cast<const T*>((reinterpret_cast<uintptr_t>(values.data()) + 63) / 64 * 64);
}

#define AVX512 __attribute__((target("avx512f,avx512bw")))

// Reads memory in several streams with prefetches into L1: the fastest way known here.
AVX512 int64_t read_memory(const char* data, int64_t bytes) {
  constexpr int kStreams = 8;
  const int64_t part = bytes / kStreams / 64 * 64;
  __m512i sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += 64) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      _mm_prefetch(data + s * part + i + 1024, _MM_HINT_T0);
      sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(data + s * part + i));
    }
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = _mm512_add_epi64(sum[0], sum[s]);
  return _mm512_reduce_add_epi64(sum[0]);
}

std::atomic<int64_t> sink;

// Seconds per byte, read from a part of memory that was not read for a while.
double dram_time(Pool& pool, int threads, const std::vector<char>& memory) {
  constexpr int64_t kBytes = 64 << 20;
  static int64_t begin = 0;
  begin = (begin + kBytes) % (512 << 20);
  const double start = now();
  struct Context {
    const char* data;
    int64_t part;
  } context{aligned(memory) + begin, kBytes / (8 * threads)};
  const Parallel parallel = pool.parallel();
  parallel.run(
      parallel.self, 8 * threads,
      [](void* c, int64_t task, int32_t) {
        const Context& own = *static_cast<Context*>(c);
        sink += read_memory(own.data + task * own.part, own.part);
      },
      &context);
  return (now() - start) / kBytes;
}

enum class Peak { kInt16, kInt8, kFloat };

// Seconds per product or sum of 20 independent chains.
template <Peak kPeak>
AVX512 void spin_peak(int64_t loops) {
  __m512i acc[20];
#pragma GCC unroll 20
  for (int j = 0; j < 20; ++j) acc[j] = _mm512_setzero_si512();
  __m512i x = _mm512_set1_epi32(static_cast<int>(loops)), y = _mm512_set1_epi32(3);
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 20
    for (int j = 0; j < 20; ++j) {
      if (kPeak == Peak::kInt16) asm volatile("vpdpwssd %2, %1, %0" : "+v"(acc[j]) : "v"(x), "v"(y));
      if (kPeak == Peak::kInt8) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(x), "v"(y));
      if (kPeak == Peak::kFloat) asm volatile("vfmadd231ps %2, %1, %0" : "+v"(acc[j]) : "v"(x), "v"(y));
    }
  }
#pragma GCC unroll 20
  for (int j = 1; j < 20; ++j) acc[0] = _mm512_add_epi32(acc[0], acc[j]);
  sink += _mm512_reduce_add_epi32(acc[0]);
}

template <Peak kPeak>
double dot_time(Pool& pool, int threads) {
  constexpr int64_t kLoops = 4000;
  const Parallel parallel = pool.parallel();
  const double start = now();
  parallel.run(parallel.self, 8 * threads, [](void*, int64_t, int32_t) { spin_peak<kPeak>(kLoops); }, nullptr);
  const double lanes = kPeak == Peak::kInt16 ? 32 : kPeak == Peak::kInt8 ? 64 : 16;
  return (now() - start) / (8 * threads * kLoops * 20 * lanes * 2);
}

double peak_time(Precision precision, Pool& pool, int threads) {
  if (precision == Precision::kHigh) return dot_time<Peak::kInt16>(pool, threads);
  if (precision == Precision::kMedium) return dot_time<Peak::kInt8>(pool, threads);
  return dot_time<Peak::kFloat>(pool, threads);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t value) { return argc > i ? std::atoll(argv[i]) : value; };
  const int bits = static_cast<int>(argument(1, 4));
  const int64_t group = argument(2, 128), K = argument(3, 4096), N = argument(4, 4096);
  const int threads = static_cast<int>(argument(5, 1));
  one_thread = threads == 1;
  const int64_t word_count = K * bits / 32 * N, zero_count = K / group * N * bits / 32, scale_count = K / group * N;
  const int64_t weight_bytes = word_count * 4 + zero_count * 4 + scale_count * 2;
  const int copies = static_cast<int>(std::max<int64_t>(2, (512 << 20) / weight_bytes));
  std::vector<std::vector<uint32_t>> words(copies), zeros(copies);
  std::vector<std::vector<uint16_t>> scales(copies);
  std::vector<Weight> weights;
  uint32_t state = 1;
  const auto next = [&] { return state = state * 1664525 + 1013904223; };
  for (int i = 0; i < copies; ++i) {
    words[i].resize(word_count + 16);
    zeros[i].resize(zero_count + 16);
    scales[i].resize(scale_count + 32, 0x2400);
    for (uint32_t& word : words[i]) word = next();
    for (uint32_t& word : zeros[i]) word = next();
    weights.push_back({aligned(words[i]), aligned(zeros[i]), aligned(scales[i]), DType::kFloat16, nullptr, K, N,
                       K / group, group, bits, true, 0, K});
  }
  std::vector<char> memory((512 << 20) + 4096, 1);
  Pool pool(threads);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::printf("%d bits, group %ld, K %ld, N %ld, %d threads, %s\n", bits, group, K, N, threads, isa_in_use());

  std::vector<int64_t> rows = {1, 4, 16, 64, 256};
  if (argc > 6) rows = {argument(6, 1)};
  for (int64_t M : rows) {
    std::vector<uint16_t> x(M * K), grad(M * N), out(M * N), dx(M * K);
    for (uint16_t& value : x) encode(normal(random), &value, DType::kFloat16, 0);
    for (uint16_t& value : grad) encode(normal(random), &value, DType::kFloat16, 0);
    std::printf("M=%-4ld", M);
    for (Precision precision : {Precision::kHigh, Precision::kMedium, Precision::kHighest}) {
      const Workspace workspace(gemm_workspace_bytes(weights.data(), 1, M, precision, threads));
      std::vector<double> times, of_dram, of_peak;
      int copy = 0;
      double dram = 1e9, peak = 1e9;
      for (int repeat = 0; repeat < (M <= 16 ? 40 : 16); ++repeat) {
        const double dram_before = dram_time(pool, threads, memory), peak_before = peak_time(precision, pool, threads);
        const int calls = M <= 4 ? 4 : 1;
        const double start = now();
        for (int i = 0; i < calls; ++i) {
          gemm(&weights[copy++ % copies], 1, x.data(), DType::kFloat16, M, out.data(), precision, workspace.data,
               pool.parallel());
        }
        const double time = (now() - start) / calls;
        const double peak_after = peak_time(precision, pool, threads), dram_after = dram_time(pool, threads, memory);
        times.push_back(time);
        of_dram.push_back(weight_bytes * (dram_before + dram_after) / 2 / time);
        of_peak.push_back(2.0 * M * K * N * (peak_before + peak_after) / 2 / time);
        dram = std::min({dram, dram_before, dram_after});
        peak = std::min({peak, peak_before, peak_after});
      }
      const double time = median(times);
      std::printf(" | %-7s %7.3f ms %4.1f GB/s = %3.0f%% of DRAM (%4.1f), %4.0f GOP/s = %3.0f%% of peak (%4.0f)",
                  precision == Precision::kHigh     ? "high"
                  : precision == Precision::kMedium ? "medium"
                                                    : "highest",
                  time * 1e3, weight_bytes / time / 1e9, 100 * median(of_dram), 1e-9 / dram, 2e-9 * M * K * N / time,
                  100 * median(of_peak), 1e-9 / peak);
      std::fflush(stdout);
    }
    const Workspace workspace(gemm_dx_workspace_bytes(weights[0], M, threads));
    std::vector<double> of_peak;
    for (int repeat = 0; repeat < 7; ++repeat) {
      const double before = dot_time<Peak::kFloat>(pool, threads), start = now();
      gemm_dx(weights[repeat % copies], grad.data(), DType::kFloat16, M, dx.data(), workspace.data, pool.parallel());
      const double time = now() - start, after = dot_time<Peak::kFloat>(pool, threads);
      of_peak.push_back(2.0 * M * K * N * (before + after) / 2 / time);
    }
    std::printf(" | dx %3.0f%% of float peak\n", 100 * median(of_peak));
    std::fflush(stdout);
  }
}
