// device_scope.h in a program without torch, as beside a torch that has lost the function of the current stream.
#include "bindings/device_scope.h"

#include <cstdio>

int main() {
  try {
    exllama::bindings::current_stream(0);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
