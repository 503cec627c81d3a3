// Which instruction set to use: a table, best first.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if EXLLAMA_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace exllama::cpu {
namespace {

struct Isa {
  const Kernels* kernels;
  bool (*available)();
};

bool always() { return true; }

#if EXLLAMA_X86
// __builtin_cpu_supports also asks whether the operating system saves the registers. What some compiler has no name for
// is asked of the CPU.
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kF16c = 1u << 29;  // leaf 1, ecx; clang 14 has no name for it
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & kF16c);
}
bool has_avx2_vnni() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAvxVnni = 1u << 4;  // leaf 7, subleaf 1, eax; gcc 12 has no name for it
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

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
bool has_amx() {
  static const bool granted = request_amx();
  return granted;
}
#endif

constexpr Isa kIsas[] = {
#if EXLLAMA_X86
    {&kAmxKernels, has_amx},
    {&kAvx512VnniKernels, has_avx512_vnni},
    {&kAvx512Kernels, has_avx512},
    {&kAvx2VnniKernels, has_avx2_vnni},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, always},
};
constexpr int kIsaCount = sizeof kIsas / sizeof kIsas[0];

// The best if there is no name; null if this CPU has none of that name.
const Kernels* find(const char* name) {
  const bool any = name == nullptr || *name == '\0';
  for (const Isa& isa : kIsas) {
    if (isa.available() && (any || std::strcmp(name, isa.kernels->name) == 0)) return isa.kernels;
  }
  return nullptr;
}

// The variable is read once, and not by every op: getenv does not survive another thread that sets a variable.
std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{find(std::getenv("EXLLAMA_OPS_CPU_ISA"))};
  return table;
}

}  // namespace

const char* const* isa_names() {
  static const struct Names {
    const char* names[kIsaCount + 1] = {};
    Names() {
      for (int i = 0; i < kIsaCount; ++i) names[i] = kIsas[i].kernels->name;
    }
  } table;
  return table.names;
}

bool isa_available(const char* name) { return name && *name && find(name); }

const char* isa_in_use() {
  const Kernels* table = chosen();
  return table ? table->name : nullptr;
}

void use_isa(const char* name) { chosen() = find(name); }

// A name that isa_in_use refuses is the caller's to report; the result does not depend on the choice.
const Kernels& kernels() {
  const Kernels* table = chosen();
  return table ? *table : kScalarKernels;
}

}  // namespace exllama::cpu
