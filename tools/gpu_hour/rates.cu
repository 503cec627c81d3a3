// What a GPU does, by small kernels: each line of the output is a name and a number, as csrc/cuda has them.
//
// Rates of an SM are taken by its own clock, between two barriers of one thread block that fills it.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/tile.cuh"

namespace {

constexpr int kThreads = 1024, kIterations = 4096;
constexpr int64_t kDramBytes = int64_t{1} << 30;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

int attribute(cudaDeviceAttr name) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, name, 0) != cudaSuccess) cudaGetLastError();
  return value;
}

// Both clocks of a multiprocessor around some milliseconds of work.
__global__ void clocks(uint64_t* out) {
  uint64_t start_ns, end_ns;
  const int64_t start = clock64();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start_ns));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end_ns));
  } while (end_ns - start_ns < 20'000'000);
  out[0] = static_cast<uint64_t>(clock64() - start);
  out[1] = end_ns - start_ns;
}

struct Floats {
  static constexpr int kPerIteration = 8;
  float sums[8];
  __device__ explicit Floats(int seed) {
    for (int i = 0; i < 8; ++i) sums[i] = static_cast<float>(seed + i);
  }
  __device__ void step(float a, uint32_t) {
#pragma unroll
    for (float& sum : sums) sum = fmaf(sum, a, a);
  }
  __device__ float end() const {
    float all = 0;
    for (const float sum : sums) all += sum;
    return all;
  }
};

// Half of its instructions are for the logic pipe, half for that of floats.
struct Mixed {
  static constexpr int kPerIteration = 8;
  float sums[4];
  uint32_t words[4];
  __device__ explicit Mixed(int seed) {
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(seed + i), words[i] = static_cast<uint32_t>(seed * i);
  }
  __device__ void step(float a, uint32_t mask) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = fmaf(sums[i], a, a);
      asm volatile("lop3.b32 %0, %0, %1, %2, 0x6a;" : "+r"(words[i]) : "r"(mask), "r"(mask + 1));
    }
  }
  __device__ float end() const {
    float all = 0;
    for (int i = 0; i < 4; ++i) all += sums[i] + static_cast<float>(words[i]);
    return all;
  }
};

// Eight tiles of 16 x 8 by steps of k = 16, a warp each; before sm_80 of k = 8.
struct Mma {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static constexpr int kDepth = 16;
#else
  static constexpr int kDepth = 8;
#endif
  static constexpr int kPerIteration = 8 * 16 * 8 * kDepth / 32;  // multiply-adds of a lane
  float sums[8][4];
  uint32_t a[4], b[2];
  __device__ explicit Mma(int seed) {
    for (auto& tile : sums)
      for (float& sum : tile) sum = 0;
    for (uint32_t& word : a) word = static_cast<uint32_t>(seed) & 0x3c003c00;
    for (uint32_t& word : b) word = static_cast<uint32_t>(seed) & 0x3c003c00;
  }
  __device__ void step(float, uint32_t) {
#pragma unroll
    for (auto& c : sums) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
    }
  }
  __device__ float end() const {
    float all = 0;
    for (const auto& tile : sums)
      for (const float sum : tile) all += sum;
    return all;
  }
};

template <typename Work>
__global__ void __launch_bounds__(kThreads) compute(int64_t* cycles, float* out, float a, uint32_t mask) {
  Work work(static_cast<int>(threadIdx.x));
  __syncthreads();
  const int64_t start = clock64();
#pragma unroll 4
  for (int i = 0; i < kIterations; ++i) work.step(a, mask);
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  out[blockIdx.x * blockDim.x + threadIdx.x] = work.end();
}

__global__ void read(const uint4* data, int64_t count, int passes, uint32_t* out) {
  uint32_t all = 0;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 8
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += threads) {
      const uint4 word = __ldcg(data + i);
      all ^= word.x ^ word.y ^ word.z ^ word.w;
    }
  }
  if (all == 1) *out = all;
}

// One load of each thread at a time: where the next one is, the last one says. The memory holds zeros.
__global__ void read_one_at_a_time(const uint4* data, int64_t count, uint32_t* out) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t last = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += threads) {
    last = __ldcg(data + i + last).x;
  }
  if (last == 1) *out = last;
}

// Numbers of two bytes, each in a sector of its own.
__global__ void gather(const uint16_t* data, uint32_t mask, int loads, uint32_t* out) {
  uint32_t all = 0, at = (blockIdx.x * blockDim.x + threadIdx.x) * 2654435761u;
#pragma unroll 8
  for (int i = 0; i < loads; ++i) {
    at = at * 1664525u + 1013904223u;
    all += __ldcg(data + ((at >> 8) & mask));
  }
  if (all == 1) *out = all;
}

// A store, a fence, a ticket and a load from L2, one after the other. The memory holds zeros, and still does after it.
__global__ void tickets(uint32_t* data, uint32_t* counter, int count, uint32_t* out) {
  uint32_t last = 0;
  for (int i = 0; i < count; ++i) {
    data[32 * i + last] = 0;
    __threadfence();
    const uint32_t ticket = atomicAdd(counter + last, 1u);
    last = __ldcg(data + 32 * (ticket % 1024));
  }
  if (last == 1) *out = last;
}

// Searches of a thread block for its expert, one after the other, by offsets that lie in L2. They are zeros, so that all
// rows belong to none.
__global__ void finds(const int32_t* offsets, int64_t experts, int64_t stride, int count, uint32_t* out) {
  int64_t first = 0;
  for (int i = 0; i < count; ++i) {
    first += exllama::cuda::rows_of_tile({offsets + i * stride + first, experts}, 8, 0, 8).first;
  }
  if (first == 1) *out = 1;
}

__global__ void nothing(uint32_t*) {}

template <typename F>
double seconds_of(const F& launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  launch();
  for (int round = 0; round < 7; ++round) {
    cudaEventRecord(start);
    launch();
    cudaEventRecord(end);
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, end);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] / 1e3;
}

// What an SM does in a cycle.
template <typename Work>
double rate_of(int sms, int64_t* cycles, float* out, int64_t per_iteration) {
  compute<Work><<<sms, kThreads>>>(cycles, out, 0.5f, 0x5a5a5a5a);
  compute<Work><<<sms, kThreads>>>(cycles, out, 0.5f, 0x5a5a5a5a);
  check(cudaDeviceSynchronize(), "compute");
  std::vector<int64_t> all(static_cast<size_t>(sms));
  check(cudaMemcpy(all.data(), cycles, all.size() * sizeof(int64_t), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::sort(all.begin(), all.end());
  const double operations = static_cast<double>(per_iteration) * kIterations * kThreads;
  return operations / static_cast<double>(all[all.size() / 2]);
}

double launch_seconds(uint32_t* out) {
  constexpr int kLaunches = 512;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  for (int i = 0; i < kLaunches; ++i) nothing<<<1, 32, 0, stream>>>(out);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  return seconds_of([&] { check(cudaGraphLaunch(executable, nullptr), "cudaGraphLaunch"); }) / kLaunches;
}

}  // namespace

int main() {
  const int sms = attribute(cudaDevAttrMultiProcessorCount);
  const int arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  const double nominal_bytes =
      2e3 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
  // A power of two that stays in L2.
  int64_t l2_bytes = int64_t{8} << 20;
  while (l2_bytes > attribute(cudaDevAttrL2CacheSize) / 4) l2_bytes /= 2;
  uint4* data = nullptr;
  uint32_t* out = nullptr;
  check(cudaMalloc(&data, kDramBytes), "cudaMalloc");
  check(cudaMalloc(&out, sizeof(float) * static_cast<size_t>(sms) * kThreads + 64), "cudaMalloc");
  check(cudaMemset(data, 0, kDramBytes), "cudaMemset");
  auto* cycles = reinterpret_cast<int64_t*>(data) + (1 << 20);
  auto* sums = reinterpret_cast<float*>(out);

  const double floats = rate_of<Floats>(sms, cycles, sums, Floats::kPerIteration);
  const double issues = rate_of<Mixed>(sms, cycles, sums, Mixed::kPerIteration);
  const double mma =
      arch >= 75 ? rate_of<Mma>(sms, cycles, sums, arch >= 80 ? Mma::kPerIteration : Mma::kPerIteration / 2) : 0;
  uint64_t both[2];
  clocks<<<1, 1>>>(reinterpret_cast<uint64_t*>(cycles));
  check(cudaMemcpy(both, cycles, sizeof both, cudaMemcpyDeviceToHost), "clocks");
  check(cudaMemset(data, 0, kDramBytes), "cudaMemset");
  const double ghz = static_cast<double>(both[0]) / static_cast<double>(both[1]);
  const double cycles_per_s = ghz * 1e9 * sms;

  const double dram = kDramBytes / seconds_of([&] { read<<<sms * 8, 256>>>(data, kDramBytes / 16, 1, out); });
  const double l2 =
      16 * static_cast<double>(l2_bytes) / seconds_of([&] { read<<<sms * 8, 256>>>(data, l2_bytes / 16, 16, out); });
  const double waiting =
      kDramBytes / seconds_of([&] { read_one_at_a_time<<<sms, kThreads>>>(data, kDramBytes / 16, out); });
  constexpr int kLoads = 512;
  const double gathered = static_cast<double>(sms) * 8 * 256 * kLoads / seconds_of([&] {
                            gather<<<sms * 8, 256>>>(reinterpret_cast<uint16_t*>(data),
                                                     static_cast<uint32_t>(l2_bytes / 2 - 1), kLoads, out);
                          });
  constexpr int kTickets = 4096;
  auto* words = reinterpret_cast<uint32_t*>(data);
  const double ticket = seconds_of([&] { tickets<<<1, 1>>>(words, words + (1 << 27), kTickets, out); }) / kTickets;
  constexpr int64_t kExperts = 128, kStride = 256;
  const auto searches = static_cast<int>(l2_bytes / 4 / kStride);
  const auto* offsets = reinterpret_cast<const int32_t*>(data);
  const double find = seconds_of([&] { finds<<<1, 128>>>(offsets, kExperts, kStride, searches, out); }) / searches;
  const double launch = launch_seconds(out);

  std::printf("arch %d\nsm_count %d\nghz %.4f\n", arch, sms, ghz);
  std::printf("floats %.2f\nissues %.2f\nmma %.2f\n", floats, issues, mma);
  std::printf("dram_gb_per_s %.1f\ndram_bytes %.3f\n", dram / 1e9, dram / cycles_per_s);
  std::printf("kDramEfficiency %.4f\n", nominal_bytes > 0 ? dram / nominal_bytes : 0);
  std::printf("kDramLatencyUs %.4f\n", 16.0 * sms * kThreads / waiting * 1e6);
  std::printf("kL2BytesPerCycle %.3f\nkGatheredPerCycle %.3f\n", l2 / cycles_per_s, gathered / cycles_per_s);
  std::printf("kTicketUs %.4f\nkFindExpertUs %.4f\n", ticket * 1e6, find * 1e6);
  std::printf("kLaunchUs %.4f\nkLaunchCycles %.1f\n", launch * 1e6, launch * ghz * 1e9);
  check(cudaGetLastError(), "a launch");
}
