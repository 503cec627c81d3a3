#include "cpu/isa/arm_features.h"

#include "cpu/isa/isas.h"

#if EXLLAMA_NEON

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace exllama::cpu::arm {
namespace {

#if defined(__linux__)
// The headers of some systems have no names for these bits of the kernel's.
constexpr unsigned long kDotprod = 1ul << 20;  // of AT_HWCAP
constexpr unsigned long kI8mm = 1ul << 13;     // of AT_HWCAP2

bool has(unsigned long vector, unsigned long bit) { return getauxval(vector) & bit; }
#elif defined(__APPLE__)
bool has(const char* feature) {
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname(feature, &there, &size, nullptr, 0) == 0 && there != 0;
}
#endif

}  // namespace

bool has_dotprod() {
#if defined(__linux__)
  return has(AT_HWCAP, kDotprod);
#elif defined(__APPLE__)
  return has("hw.optional.arm.FEAT_DotProd");
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(__linux__)
  return has_dotprod() && has(AT_HWCAP2, kI8mm);
#elif defined(__APPLE__)
  return has_dotprod() && has("hw.optional.arm.FEAT_I8MM");
#else
  return false;
#endif
}

}  // namespace exllama::cpu::arm

#endif
