// Warp-wide instructions, one kernel each; every lane writes what it got (test_warp.py).
#include <cstdint>

#define LANE_KERNEL(name, expression)                                    \
    extern "C" __global__ void name(const uint32_t* in, uint32_t* out) { \
        const uint32_t lane = threadIdx.x, a = in[lane];                 \
        out[lane] = expression;                                          \
    }
LANE_KERNEL(shfl_up, __shfl_up_sync(~0u, a, 3, 16))
LANE_KERNEL(shfl_down, __shfl_down_sync(~0u, a, 5, 8))
LANE_KERNEL(shfl_xor, __shfl_xor_sync(~0u, a, 9))
LANE_KERNEL(shfl_idx, __shfl_sync(~0u, a, a & 31, 32))
LANE_KERNEL(shfl_idx_16, __shfl_sync(~0u, a, 20, 16))
LANE_KERNEL(ballot, __ballot_sync(~0u, a & 1))
LANE_KERNEL(any, __any_sync(~0u, lane == 7 && a) + 2 * __all_sync(~0u, lane != 7) + 4 * __all_sync(~0u, lane < 32))
LANE_KERNEL(match_any, __match_any_sync(~0u, a % 3))
LANE_KERNEL(redux_add, __reduce_add_sync(~0u, a))
LANE_KERNEL(redux_min, (uint32_t)__reduce_min_sync(~0u, (int)a))
LANE_KERNEL(redux_max, __reduce_max_sync(~0u, a))
LANE_KERNEL(redux_xor, __reduce_xor_sync(~0u, a))
LANE_KERNEL(even_lanes_only, (lane & 1) ? 77u : __shfl_xor_sync(0x55555555u, a, 2))
LANE_KERNEL(count_of_votes,
            __syncthreads_count(a & 1) + 100 * __syncthreads_or(lane == 3) + 1000 * __syncthreads_and(lane < 31))

// ldmatrix: lane l brings row l % 8 of matrix l / 8, and the rows lie 16 bytes apart.
template <bool kTransposed> __device__ void load_matrices(const uint32_t* in, uint32_t* out) {
    __shared__ __align__(16) uint32_t s_rows[128];
    for (int i = 0; i < 4; ++i) s_rows[4 * threadIdx.x + i] = in[4 * threadIdx.x + i];
    __syncwarp();
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&s_rows[4 * threadIdx.x]));
    uint32_t r[4];
    if (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}
extern "C" __global__ void ldmatrix_x4(const uint32_t* in, uint32_t* out) { load_matrices<false>(in, out); }
extern "C" __global__ void ldmatrix_x4_trans(const uint32_t* in, uint32_t* out) { load_matrices<true>(in, out); }

// mma on fragments that the host has laid out: a, b and c of lane l at l * 4, 128 + l * 2 and 192 + l * 4.
#define MMA_KERNEL(name, instruction)                                                                               \
    extern "C" __global__ void name(const uint32_t* in, uint32_t* out) {                                            \
        const uint32_t *a = in + 4 * threadIdx.x, *b = in + 128 + 2 * threadIdx.x, *c = in + 192 + 4 * threadIdx.x; \
        uint32_t* d = out + 4 * threadIdx.x;                                                                        \
        asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"             \
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),      \
                       "r"(c[2]), "r"(c[3]));                                                                       \
    }
MMA_KERNEL(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
MMA_KERNEL(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMA_KERNEL(saturating_s8, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32")
MMA_KERNEL(mma_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")

// The same product by two of half the depth: registers 0 and 1 of a hold the first half of k, 2 and 3 the second.
#define HALVES_KERNEL(name, instruction)                                                                            \
    extern "C" __global__ void name(const uint32_t* in, uint32_t* out) {                                            \
        const uint32_t *a = in + 4 * threadIdx.x, *b = in + 128 + 2 * threadIdx.x, *c = in + 192 + 4 * threadIdx.x; \
        uint32_t d[4] = {c[0], c[1], c[2], c[3]};                                                                   \
        for (int half = 0; half < 2; ++half)                                                                        \
            asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                         \
                         : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                           \
                         : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));                                   \
        for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];                                                \
    }
HALVES_KERNEL(two_mma_f16, "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32")
HALVES_KERNEL(two_mma_bf16, "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32")
HALVES_KERNEL(two_mma_s8, "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32")
// A wrong fragment index: the second and the third register of a in each other's place.
extern "C" __global__ void mma_swapped(const uint32_t* in, uint32_t* out) {
    const uint32_t *a = in + 4 * threadIdx.x, *b = in + 128 + 2 * threadIdx.x, *c = in + 192 + 4 * threadIdx.x;
    uint32_t* d = out + 4 * threadIdx.x;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Atomics of four warps on one word each.
extern "C" __global__ void atomics(uint32_t* words, float* sum, uint32_t* pairs) {
    const uint32_t i = threadIdx.x;
    atomicAdd(&words[0], i);
    atomicMin(reinterpret_cast<int*>(&words[1]), static_cast<int>(i) - 50);
    atomicMax(&words[2], i);
    atomicOr(&words[3], 1u << (i % 32));
    atomicCAS(&words[4], i, i + 1);
    atomicExch(&words[5], i);
    atomicInc(&words[6], 9);
    atomicAdd(reinterpret_cast<unsigned long long*>(&words[8]), 1ull << 32);
    atomicAdd(sum, 0.5f);
    asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(pairs), "r"(0x40003c00u) : "memory");
}
// A function that is called, with arrays in local memory, a table in constant memory and a switch.
__constant__ float table[4] = {10.f, 20.f, 30.f, 40.f};
__device__ uint32_t counter;
__device__ __noinline__ float called(const float* values, int n) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += values[i] * table[i & 3];
    return sum;
}
extern "C" __global__ void functions(float* out, int n) {
    float local[8];
    for (int i = 0; i < 8; ++i) local[(i * 3 + threadIdx.x) & 7] = static_cast<float>(i);
    out[threadIdx.x] = called(local, n);
    atomicAdd(&counter, 1);
    __syncthreads();
    if (threadIdx.x == 0) out[32] = static_cast<float>(atomicExch(&counter, 0));
}
