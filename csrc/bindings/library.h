// Ops and kernels for the dispatcher, by the C functions of torch's stable ABI. torch's own class for them, StableLibrary,
// drops their errors in the headers of torch 2.10, and what was refused would pass for registered.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>
#include <torch/headeronly/version.h>

namespace exllama::bindings {

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

// Its destructor takes back what it defined and implemented, unless it was told to keep it. Throws std::runtime_error.
class Library {
 public:
  // It owns the namespace and defines its ops.
  explicit Library(const char* name_space) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_def(name_space, __FILE__, __LINE__, &handle_));
  }
  // It implements ops of a namespace, whoever defines them.
  Library(const char* name_space, const char* dispatch_key) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl(name_space, dispatch_key, __FILE__, __LINE__, &handle_));
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() {
    if (handle_ != nullptr) aoti_torch_delete_library_object(handle_);
  }

  void define(const char* schema) { TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(handle_, schema)); }
  void implement(const char* op, Kernel kernel) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(handle_, op, kernel, TORCH_ABI_VERSION));
  }
  // For ever: at the end of the process torch may be gone already.
  void keep() { handle_ = nullptr; }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace exllama::bindings
