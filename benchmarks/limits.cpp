// Limits of the machine for `benchmarks.limits`: DRAM reading and the peaks of multiply-and-add, on several threads.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

std::atomic<int64_t> sink;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  asm volatile("yield");
#endif
}

// Seconds in which `tasks` are done, from when all threads are there. Tasks are claimed one by one: a core that is
// taken away for a while does less.
template <typename Body>
double timed(int threads, int tasks, Body body) {
  std::atomic<int> ready{0}, next{0};
  std::vector<Clock::time_point> ends(threads);
  const auto work = [&](int thread) {
    for (int task; (task = next.fetch_add(1)) < tasks;) body(task);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] {
      ready.fetch_add(1);
      while (ready.load() < threads) pause();
      work(thread);
    });
  }
  while (ready.load() < threads - 1) pause();
  const Clock::time_point start = Clock::now();
  ready.fetch_add(1);
  work(0);
  for (std::thread& other : others) other.join();
  Clock::time_point end = ends[0];
  for (const Clock::time_point& other : ends) end = end < other ? other : end;
  return std::chrono::duration<double>(end - start).count();
}

// Enough for latency times throughput of any instruction below, and few enough for 16 registers.
constexpr int kChains = 12;
constexpr int kLoops = 4000;

struct Peak {
  const char *isa, *kind;
  void (*spin)();
  int products;  // of one instruction, or one sequence of them
};

// Streams read side by side, with prefetches into L1: the fastest way known.
constexpr int kStreams = 8;

#if defined(__x86_64__)

__attribute__((target("avx2"))) void read_memory(const char* data, int64_t bytes) {
  const int64_t part = bytes / kStreams / 64 * 64;
  __m256i sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += 64) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const char* line = data + s * part + i;
      _mm_prefetch(line + 1024, _MM_HINT_T0);
      sum[s] = _mm256_add_epi64(sum[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
      sum[s] = _mm256_add_epi64(sum[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32)));
    }
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = _mm256_add_epi64(sum[0], sum[s]);
  sink += _mm256_extract_epi64(sum[0], 0);
}

#define CHAINS(NAME, TARGET, VECTOR, CONSTRAINT, ...)                                                                \
  __attribute__((target(TARGET))) void NAME() {                                                                      \
    VECTOR acc[kChains] = {}, x = {}, y = {};                                                                        \
    for (int i = 0; i < kLoops; ++i) {                                                                               \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) {                                                   \
        VECTOR product;                                                                                              \
        asm volatile(__VA_ARGS__ : "+" CONSTRAINT(acc[j]), "=&" CONSTRAINT(product) : CONSTRAINT(x), CONSTRAINT(y)); \
      }                                                                                                              \
    }                                                                                                                \
  }

#define AVX512 "avx512f,avx512bw,avx512vnni"
CHAINS(float_avx512, AVX512, __m512i, "v", "vfmadd231ps %3, %2, %0")
CHAINS(int16_vnni, AVX512, __m512i, "v", "vpdpwssd %3, %2, %0")
CHAINS(int8_vnni, AVX512, __m512i, "v", "vpdpbusd %3, %2, %0")
CHAINS(int16_avx512, AVX512, __m512i, "v", "vpmaddwd %3, %2, %1\n vpaddd %1, %0, %0")
CHAINS(int8_avx512, AVX512, __m512i, "v", "vpmaddubsw %3, %2, %1\n vpmaddwd %3, %1, %1\n vpaddd %1, %0, %0")
CHAINS(int16_avx2_vnni, "avx2", __m256i, "x", "%{vex%} vpdpwssd %3, %2, %0")
CHAINS(int8_avx2_vnni, "avx2", __m256i, "x", "%{vex%} vpdpbusd %3, %2, %0")
CHAINS(float_avx2, "avx2,fma", __m256i, "x", "vfmadd231ps %3, %2, %0")
CHAINS(int16_avx2, "avx2", __m256i, "x", "vpmaddwd %3, %2, %1\n vpaddd %1, %0, %0")
CHAINS(int8_avx2, "avx2", __m256i, "x", "vpmaddubsw %3, %2, %1\n vpmaddwd %3, %1, %1\n vpaddd %1, %0, %0")

// With AMX too the peaks are those of the vector units.
constexpr Peak kPeaks[] = {
    {"amx", "float", float_avx512, 16},
    {"amx", "int16", int16_vnni, 32},
    {"amx", "int8", int8_vnni, 64},
    {"avx512_vnni", "float", float_avx512, 16},
    {"avx512_vnni", "int16", int16_vnni, 32},
    {"avx512_vnni", "int8", int8_vnni, 64},
    {"avx512", "float", float_avx512, 16},
    {"avx512", "int16", int16_avx512, 32},
    {"avx512", "int8", int8_avx512, 64},
    {"avx2_vnni", "float", float_avx2, 8},
    {"avx2_vnni", "int16", int16_avx2_vnni, 16},
    {"avx2_vnni", "int8", int8_avx2_vnni, 32},
    {"avx2", "float", float_avx2, 8},
    {"avx2", "int16", int16_avx2, 16},
    {"avx2", "int8", int8_avx2, 32},
};

#elif defined(__aarch64__)

void read_memory(const char* data, int64_t bytes) {
  const int64_t part = bytes / kStreams / 64 * 64;
  uint64x2_t sum[kStreams] = {};
  for (int64_t i = 0; i < part; i += 64) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const uint64_t* line = reinterpret_cast<const uint64_t*>(data + s * part + i);
      __builtin_prefetch(line + 128);
      for (int j = 0; j < 8; j += 2) sum[s] = vaddq_u64(sum[s], vld1q_u64(line + j));
    }
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = vaddq_u64(sum[0], sum[s]);
  sink += vgetq_lane_u64(sum[0], 0);
}

#define CHAINS(NAME, TARGET, ...)                                                  \
  __attribute__((target(TARGET))) void NAME() {                                    \
    int32x4_t acc[kChains] = {}, x = {}, y = {};                                   \
    for (int i = 0; i < kLoops; ++i) {                                             \
      _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) {                 \
        int32x4_t product;                                                         \
        asm volatile(__VA_ARGS__ : "+w"(acc[j]), "=&w"(product) : "w"(x), "w"(y)); \
      }                                                                            \
    }                                                                              \
  }

CHAINS(float_neon, "arch=armv8-a", "fmla %0.4s, %2.4s, %3.4s")
CHAINS(int16_neon, "arch=armv8-a", "smlal %0.4s, %2.4h, %3.4h")
CHAINS(int8_neon, "arch=armv8-a", "smull %1.8h, %2.8b, %3.8b\n sadalp %0.4s, %1.8h")
CHAINS(int8_dotprod, "arch=armv8.2-a+dotprod", "sdot %0.4s, %2.16b, %3.16b")
CHAINS(int8_i8mm, "arch=armv8.2-a+i8mm", "smmla %0.4s, %2.16b, %3.16b")

constexpr Peak kPeaks[] = {
    {"neon", "float", float_neon, 4},         {"neon", "int16", int16_neon, 4},
    {"neon", "int8", int8_neon, 8},           {"neon_dotprod", "float", float_neon, 4},
    {"neon_dotprod", "int16", int16_neon, 4}, {"neon_dotprod", "int8", int8_dotprod, 16},
    {"neon_i8mm", "float", float_neon, 4},    {"neon_i8mm", "int16", int16_neon, 4},
    {"neon_i8mm", "int8", int8_i8mm, 32},
};

#endif

}  // namespace

// Bytes per second of reading `bytes` at `data`.
extern "C" double limits_dram(const char* data, int64_t bytes, int threads) {
  const int tasks = 8 * threads;
  const int64_t part = bytes / tasks;
  return part * tasks / timed(threads, tasks, [&](int task) { read_memory(data + task * part, part); });
}

// Operations (two for a product that is added) per second; 0 for an unknown name.
extern "C" double limits_dot(const char* isa, const char* kind, int threads) {
  for (const Peak& peak : kPeaks) {
    if (std::strcmp(peak.isa, isa) || std::strcmp(peak.kind, kind)) continue;
    const int tasks = 8 * threads;
    const double operations = 2.0 * tasks * kLoops * kChains * peak.products;
    return operations / timed(threads, tasks, [&](int) { peak.spin(); });
  }
  return 0;
}
