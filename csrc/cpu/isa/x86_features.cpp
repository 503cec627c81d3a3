#include "cpu/isa/x86_features.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_X86

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace exllama::cpu::x86 {
namespace {

// The registers of AMX are large, so that Linux wants to be asked for them once in a process.
bool request_amx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // leaf 7, subleaf 0, edx
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kAmxTile) || !(edx & kAmxInt8)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

// __builtin_cpu_supports also asks whether the operating system saves the registers. What some compiler has no name for
// is asked of the CPU.
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kF16c = 1u << 29;  // leaf 1, ecx; clang 14 has no name for it
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & kF16c);
}

bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAvxVnni = 1u << 4;  // leaf 7, subleaf 1, eax; gcc 12 has no name for it
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_amx_int8() {
  static const bool granted = request_amx();
  return granted;
}

}  // namespace exllama::cpu::x86

#endif
