// Copies from global to shared memory that pass by no register, and that a thread waits for later: from sm_80 on.
#pragma once

#include <cstdint>

namespace exllama::cuda {

// The address of something in shared memory, as copy_async takes it.
__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Copies 4, 8 or 16 bytes, to which both addresses are aligned. Where `there` is false, zeros are written instead. What
// lies at `to` is undefined until the thread has waited for it, and for other threads until a barrier after that.
template <int bytes>
__device__ inline void copy_async(uint32_t to, const void* from, bool there = true) {
  const int present = there ? bytes : 0;
  // Copies of 16 bytes may pass by L1, where nothing would find them again.
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(present)
                 : "memory");
  }
}

// Ends a group of the thread's copies.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of the thread's copies but the last `left`.
template <int left>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

}  // namespace exllama::cuda
