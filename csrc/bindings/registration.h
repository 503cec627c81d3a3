// Kernels to the dispatcher, of one device in one library.
#pragma once

#include <cstring>
#include <exception>
#include <string>

#include "bindings/library.h"

namespace exllama::bindings {

// The kernels of the ops. An op with an overload that has no autograd has the same kernel twice.
struct Kernels {
  Kernel shuffle, unshuffle, dequantize, gemm, gemm_dx, gemm_multi;
};

// Registers the kernel of one op, or of every op if `op` is null, in an operator namespace that has the schemas or will
// have them. Returns null, or what went wrong; the text lives until the thread's next call.
inline const char* register_kernels(const Kernels& kernels, const char* name_space, const char* op,
                                    const char* dispatch_key) {
  const struct {
    const char* op;
    Kernel kernel;
  } implementations[] = {
      {"gptq_shuffle", kernels.shuffle}, {"gptq_unshuffle", kernels.unshuffle}, {"gptq_dequantize", kernels.dequantize},
      {"gptq_gemm", kernels.gemm}, {"gptq_gemm.no_autograd", kernels.gemm},
      {"gptq_gemm_dx", kernels.gemm_dx}, {"gptq_gemm_dx.no_autograd", kernels.gemm_dx},
      {"gptq_gemm_multi", kernels.gemm_multi}, {"gptq_gemm_multi.no_autograd", kernels.gemm_multi},
  };
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
