// Small kernels, right or with one fault each, that the emulator must run or catch (test_faults.py).
#include <cuda_runtime.h>

#include <cstdint>

// Reverses 256 numbers through shared memory; the barrier is what makes it right.
template <bool kBarrier> __global__ void reverse(const float* from, float* to) {
    __shared__ float s_values[256];
    s_values[threadIdx.x] = from[threadIdx.x];
    if (kBarrier) __syncthreads();
    to[threadIdx.x] = s_values[255 - threadIdx.x];
}
// Threads of one warp exchange with or without __syncwarp.
template <bool kBarrier> __global__ void swap_neighbours(const float* from, float* to) {
    __shared__ float s_values[32];
    s_values[threadIdx.x] = from[threadIdx.x];
    if (kBarrier) __syncwarp();
    to[threadIdx.x] = s_values[threadIdx.x ^ 1];
}
// The second use of the buffer needs a barrier before the overwriting (write after read).
template <bool kBarrier> __global__ void two_rounds(const float* from, float* to) {
    __shared__ float s_values[256];
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        s_values[threadIdx.x] = from[threadIdx.x] + round;
        __syncthreads();
        sum += s_values[255 - threadIdx.x];
        if (kBarrier) __syncthreads();
    }
    to[threadIdx.x] = sum;
}
__global__ void copy(const float* from, float* to, int first) { to[threadIdx.x] = from[threadIdx.x + first]; }
__global__ void copy_float4(const float* from, float* to, int first) {
    reinterpret_cast<float4*>(to)[threadIdx.x] = *reinterpret_cast<const float4*>(from + first + 4 * threadIdx.x);
}
__global__ void shared_beyond(float* to, int bytes) {
    extern __shared__ unsigned char s_bytes[];
    s_bytes[bytes - 1 + threadIdx.x] = 1;
    __syncthreads();
    to[0] = s_bytes[bytes - 1];
}
// From one array into the next, where a device does not notice.
__global__ void shared_into_next(const float* from, float* to, int first) {
    __shared__ float s_first[64], s_second[64];
    s_first[threadIdx.x] = from[threadIdx.x];
    s_second[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = s_first[(threadIdx.x + first) % 128] + s_second[threadIdx.x ^ 1];
}
__global__ void uninitialized_shared(float* to) {
    extern __shared__ float s_floats[];
    to[threadIdx.x] = s_floats[threadIdx.x];
}
// Half of a warp goes to a barrier the other half never reaches.
__global__ void half_barrier(float* to) {
    if (threadIdx.x < 16) __syncthreads();
    else asm volatile("bar.sync 1;");
    to[threadIdx.x] = 1;
}
__global__ void returned_before_barrier(float* to, int n) {
    if (threadIdx.x >= n) return;
    __syncthreads();
    to[threadIdx.x] = 1;
}
__global__ void shuffle_from_returned(float* to) {
    if (threadIdx.x == 5) return;
    to[threadIdx.x] = __shfl_xor_sync(~0u, float(threadIdx.x), 1);
}
__global__ void waits_for_other_block(volatile int* flag) {
    if (blockIdx.x == 1) *flag = 1;
    else
        while (*flag == 0) {
        }
}
__global__ void last_writer(int* to) { *to = blockIdx.x; }
// The partial sums of all blocks, added by whichever block is last: right with fences, whatever the order.
template <bool kFence> __global__ void last_block_adds(float* partial, unsigned* counter, float* to) {
    __shared__ bool s_is_last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = blockIdx.x + 1;
        if (kFence) __threadfence();
        s_is_last = atomicAdd(counter, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (s_is_last && threadIdx.x == 0) {
        if (kFence) __threadfence();
        float sum = 0;
        for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
        *to = sum;
        *counter = 0;
    }
}

// Copies 256 floats through two stages of cp.async.
template <int kPending, bool kBarrier> __global__ void staged_copy(const float* from, float* to) {
    __shared__ float4 s_stage[2][32];
    // What was there before is no NaN: only the emulator's poison shows a read that comes too early.
    for (int stage = 0; stage < 2; ++stage) s_stage[stage][threadIdx.x] = make_float4(0, 0, 0, 0);
    __syncthreads();
    auto issue = [&](int stage) {
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&s_stage[stage][threadIdx.x]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16; cp.async.commit_group;" ::"r"(address),
                     "l"(from + 4 * (32 * stage + threadIdx.x))
                     : "memory");
    };
    issue(0);
    issue(1);
    for (int stage = 0; stage < 2; ++stage) {
        if (stage == 0) asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
        else asm volatile("cp.async.wait_group 0;" ::: "memory");
        if (kBarrier) __syncthreads();
        reinterpret_cast<float4*>(to)[32 * stage + threadIdx.x] = s_stage[stage][threadIdx.x ^ 1];
    }
}
// Bytes beyond src-size are zeros.
__global__ void partial_copy(const float* from, float* to, int present) {
    __shared__ float4 s_stage[32];
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&s_stage[threadIdx.x]));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2; cp.async.wait_all;" ::"r"(address), "l"(from),
                 "r"(present)
                 : "memory");
    reinterpret_cast<float4*>(to)[threadIdx.x] = s_stage[threadIdx.x];
}
__global__ void __launch_bounds__(64) bounded(float* to) { to[threadIdx.x] = 1; }

#define LAUNCH(name, kernel, threads)                                                           \
    extern "C" cudaError_t name(const float* from, float* to, int value, cudaStream_t stream) { \
        kernel;                                                                                 \
        return cudaGetLastError();                                                              \
    }
#define COPY(name, kernel, threads) LAUNCH(name, (kernel<<<1, threads, 0, stream>>>(from, to)), threads)
COPY(reverse_right, reverse<true>, 256)
COPY(reverse_wrong, reverse<false>, 256)
COPY(swap_right, swap_neighbours<true>, 32)
COPY(swap_wrong, swap_neighbours<false>, 32)
COPY(two_rounds_right, two_rounds<true>, 256)
COPY(two_rounds_wrong, two_rounds<false>, 256)
COPY(staged_right, (staged_copy<1, true>), 32)
COPY(staged_without_wait, (staged_copy<2, true>), 32)
COPY(staged_without_barrier, (staged_copy<1, false>), 32)
LAUNCH(copy_from, (copy<<<1, 64, 0, stream>>>(from, to, value)), 64)
LAUNCH(copy_float4_from, (copy_float4<<<1, 16, 0, stream>>>(from, to, value)), 16)
LAUNCH(shared_beyond_end, (shared_beyond<<<1, 2, 64, stream>>>(to, value)), 2)
LAUNCH(shared_next, (shared_into_next<<<1, 64, 0, stream>>>(from, to, value)), 64)
LAUNCH(uninitialized, (uninitialized_shared<<<1, 32, 128, stream>>>(to)), 32)
LAUNCH(deadlock, (half_barrier<<<1, 32, 0, stream>>>(to)), 32)
LAUNCH(returned_early, (returned_before_barrier<<<1, 64, 0, stream>>>(to, value)), 64)
LAUNCH(shuffle_returned, (shuffle_from_returned<<<1, 32, 0, stream>>>(to)), 32)
LAUNCH(block_waits, (waits_for_other_block<<<2, 1, 0, stream>>>(reinterpret_cast<int*>(to))), 1)
LAUNCH(last_block_writes, (last_writer<<<7, 1, 0, stream>>>(reinterpret_cast<int*>(to))), 1)
LAUNCH(partial, (partial_copy<<<1, 32, 0, stream>>>(from, to, value)), 32)
LAUNCH(bounded_launch, (bounded<<<1, value, 0, stream>>>(to)), 64)
LAUNCH(much_shared, (uninitialized_shared<<<1, 32, value, stream>>>(to)), 32)
LAUNCH(fenced_sum, (last_block_adds<true><<<5, 32, 0, stream>>>(to + 8, reinterpret_cast<unsigned*>(to + 1), to)), 32)
LAUNCH(unfenced_sum, (last_block_adds<false><<<5, 32, 0, stream>>>(to + 8, reinterpret_cast<unsigned*>(to + 1), to)),
       32)

// How often it ran, in a variable of the module; it traps at the number `value`.
__device__ int runs;
__global__ void count_runs(float* to, int value) {
    if (threadIdx.x != 0) return;
    to[0] = ++runs;
    if (runs == value) __trap();
}
LAUNCH(count_until, (count_runs<<<1, 32, 0, stream>>>(to, value)), 32)

extern "C" cudaError_t allow_shared(int bytes) {
    return cudaFuncSetAttribute(uninitialized_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
// What a captured graph may and may not contain.
extern "C" cudaError_t memset_then_copy(const float* from, float* to, int value, cudaStream_t stream) {
    cudaMemsetAsync(to, 0, 64 * sizeof(float), stream);
    copy<<<1, 32, 0, stream>>>(from, to, value);
    return cudaGetLastError();
}
extern "C" cudaError_t copy_then_synchronize(const float* from, float* to, int value, cudaStream_t stream) {
    copy<<<1, 32, 0, stream>>>(from, to, value);
    return cudaDeviceSynchronize();
}
extern "C" cudaError_t allocate(const float*, float*, int, cudaStream_t) {
    void* memory;
    return cudaMalloc(&memory, 16);
}
