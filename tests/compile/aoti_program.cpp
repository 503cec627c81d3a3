// A program without Python: defines the ops, registers the CPU kernels, loads an AOTInductor package and runs it.
//
// Arguments: the schema library, the CPU library, the package, a file of float32 (rows, columns), rows, columns, and the
// file for the float32 result.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

template <typename Function>
Function symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW);
  void* address = handle != nullptr ? dlsym(handle, name) : nullptr;
  if (address == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<Function>(address);
}

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace

int main(int, char** arguments) try {
  check(symbol<const char* (*)()>(arguments[1], "exllama_define_ops")());
  check(symbol<const char* (*)(const char*, const char*)>(arguments[2], "exllama_cpu_register")("exllama", nullptr));
  symbol<void (*)(int32_t)>(arguments[2], "exllama_cpu_set_matmul_precision")(0);  // "highest", as in the tests

  const long rows = std::stol(arguments[5]), columns = std::stol(arguments[6]);
  at::Tensor x = at::empty({rows, columns});
  std::ifstream(arguments[4], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.numel() * sizeof(float));

  torch::inductor::AOTIModelPackageLoader loader(arguments[3]);
  const at::Tensor out = loader.run({x}).at(0).contiguous();
  std::ofstream(arguments[7], std::ios::binary)
      .write(static_cast<const char*>(out.data_ptr()), out.numel() * sizeof(float));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
