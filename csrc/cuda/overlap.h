// Launches that begin while the kernel before them on the stream still runs: CUDA's programmatic dependent launch.
//
// What overlaps is the launch itself, of some microseconds: the thread blocks are there when the kernel before ends, and
// wait. That is safe in any order of kernels, and in a captured graph:
//
//   the kernel before writes what this one reads   this one waits before it touches global memory
//   this one writes what the kernel before reads   likewise: memory may be used again as soon as its user is launched
//   the kernels before that one                    have ended: if it overlaps too, it waited for them itself
//   the kernel after this one                      begins when this one has ended, unless it overlaps and waits too
//
// A kernel that does not wait must not be launched so. So the driver is asked whether the code that it has loaded was
// compiled for 9.0 or later, where wait_for_kernels_before waits.
#pragma once

#include "launch.h"

namespace exllama::cuda {

// Whether launches on the current device overlap: if set_launches_overlap says so, and its code waits.
bool launches_overlap();

// Launches a kernel that begins with wait_for_kernels_before.
template <typename... Parameters, typename... Arguments>
void launch_waiting(void (*kernel)(Parameters...), dim3 grid, int threads, Stream stream, const char* what,
                    Arguments... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = to_cuda(stream);
  config.attrs = &overlap;
  config.numAttrs = launches_overlap() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace exllama::cuda
