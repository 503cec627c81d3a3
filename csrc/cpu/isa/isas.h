// The tables that isa.cpp chooses from. Each is defined in the folder of its instruction set.
#pragma once

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EXLLAMA_X86 1
#else
#define EXLLAMA_X86 0
#endif

#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define EXLLAMA_NEON 1
#else
#define EXLLAMA_NEON 0
#endif

namespace exllama::cpu {

namespace scalar {
const Kernels& kernels();
}

#if EXLLAMA_X86
namespace avx2 {
const Kernels& kernels();
const Kernels& vnni_kernels();
}  // namespace avx2

namespace avx512 {
const Kernels& kernels();
const Kernels& vnni_kernels();
}  // namespace avx512

namespace amx {
const Kernels& kernels();
}
#endif

#if EXLLAMA_NEON
namespace neon {
const Kernels& kernels();
const Kernels& dotprod_kernels();
const Kernels& i8mm_kernels();
}  // namespace neon
#endif

}  // namespace exllama::cpu
