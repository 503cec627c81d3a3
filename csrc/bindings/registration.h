// Kernels to the dispatcher, of one device in one library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <string>

#include "bindings/library.h"

namespace exllama::bindings {

// A kernel, and the op whose kernel it is: by its name, or by that of an overload.
struct Implementation {
  const char* op;
  Kernel kernel;
};

// The ops that a library has kernels for: name by index, null after the last. Python asks a library for them, and gives
// an op that is not among them another backend. `implementations` is a list of them.
template <typename Implementations>
const char* op_name(const Implementations& implementations, int32_t index) {
  return index >= 0 && static_cast<size_t>(index) < std::size(implementations) ? implementations[index].op : nullptr;
}

// Registers the kernel of one op, or of every op if `op` is null, in an operator namespace that has the schemas or will
// have them. Returns null, or what went wrong; the text lives until the thread's next call.
template <typename Implementations>
const char* register_kernels(const Implementations& implementations, const char* name_space, const char* op,
                             const char* dispatch_key) {
  static thread_local std::string error;
  try {
    bool known = false;
    Library library(name_space, dispatch_key);
    for (const auto& [name, kernel] : implementations) {
      if (op != nullptr && std::strcmp(op, name) != 0) continue;
      library.implement(name, kernel);
      known = true;
    }
    if (known) {
      library.keep();
      return nullptr;
    }
    error = std::string("no ") + dispatch_key + " kernel named " + op;
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

}  // namespace exllama::bindings
