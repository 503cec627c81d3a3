// Which instruction set to use: a list, best first.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "cpu/isa/isas.h"

namespace exllama::cpu {
namespace {

using Table = const Kernels& (*)();

constexpr Table kTables[] = {
#if EXLLAMA_X86
    amx::kernels,       avx512::vnni_kernels,  avx512::kernels, avx2::vnni_kernels, avx2::kernels,
#endif
#if EXLLAMA_NEON
    neon::i8mm_kernels, neon::dotprod_kernels, neon::kernels,
#endif
    scalar::kernels,
};

// The best if there is no name; null if this CPU has none of that name.
const Kernels* find(const char* name) {
  const bool any = name == nullptr || *name == '\0';
  for (const Table table : kTables) {
    if (table().available() && (any || std::strcmp(name, table().name) == 0)) return &table();
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
    const char* names[std::size(kTables) + 1] = {};
    Names() {
      for (size_t i = 0; i < std::size(kTables); ++i) names[i] = kTables[i]().name;
    }
  } list;
  return list.names;
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
  return table ? *table : scalar::kernels();
}

}  // namespace exllama::cpu
