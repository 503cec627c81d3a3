// Kernels that are launched while the one before may still run, right or with one fault each (test_overlap.py).
#include <cuda_runtime.h>

__device__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__global__ void waits(const float* from, float* to) {
    wait();
    let_next_begin();
    to[threadIdx.x] = from[threadIdx.x];
}
__global__ void reads_before(const float* from, float* to) {
    const float value = *static_cast<const volatile float*>(from + threadIdx.x);
    wait();
    to[threadIdx.x] = value;
}
__global__ void one_warp_waits(const float* from, float* to) {
    if (threadIdx.x < 32) wait();
    to[threadIdx.x] = from[threadIdx.x];
}
__global__ void ends_without_a_wait() {}
__global__ void lets_next_begin_before() {
    let_next_begin();
    wait();
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), bool overlaps, cudaStream_t stream, Parameters... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = overlaps;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(64);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#define COPY(kernel)                                                                                          \
    extern "C" cudaError_t launch_##kernel(const float* from, float* to, int overlaps, cudaStream_t stream) { \
        return launch(kernel, overlaps != 0, stream, from, to);                                               \
    }
#define NOTHING(kernel)                                                                               \
    extern "C" cudaError_t launch_##kernel(const float*, float*, int overlaps, cudaStream_t stream) { \
        return launch(kernel, overlaps != 0, stream);                                                 \
    }
COPY(waits)
COPY(reads_before)
COPY(one_warp_waits)
NOTHING(ends_without_a_wait)
NOTHING(lets_next_begin_before)

extern "C" int ptx_version() {
    cudaFuncAttributes attributes{};
    cudaFuncGetAttributes(&attributes, waits);
    return attributes.ptxVersion;
}
