// Tasks for the caller's threads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/cpu.h"

namespace exllama::cpu {

// parallel.run for a callable of (task) or (task, worker); on the calling thread where there is one task or one thread.
template <typename Body>
void for_each(const Parallel& parallel, int64_t tasks, const Body& body) {
  const auto call = [](void* context, int64_t task, int32_t worker) {
    const Body& run = *static_cast<const Body*>(context);
    if constexpr (std::is_invocable_v<Body, int64_t, int32_t>) {
      run(task, worker);
    } else {
      run(task);
    }
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  if (tasks <= 1 || parallel.threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) call(context, task, 0);
    return;
  }
  parallel.run(parallel.self, tasks, call, context);
}

}  // namespace exllama::cpu
