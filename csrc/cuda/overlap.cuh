// What a kernel does that may be launched while the kernel before it on the stream still runs: see overlap.h.
#pragma once

#include <cstdint>

namespace exllama::cuda {

// To be called by every thread, before it reads or writes global memory. It returns when the kernels before this one on
// the stream have ended, and what they have written is visible. Then the next kernel may be launched.
//
// Nothing is loaded ahead of it, not even weights: the kernel before may have written them, as gptq_shuffle does. The
// next kernel is let in behind it, so that never more than two run at a time.
static __device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Loads what no thread writes while this kernel works. __ldg promises more, namely that nobody has written it since the
// kernel began, and the one before may have.
template <typename T>
__device__ __forceinline__ T load_global(const T* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t words[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
  }
  return *reinterpret_cast<const T*>(words);
#else
  return __ldg(from);
#endif
}

}  // namespace exllama::cuda
