// Threads that share the tasks of one caller at a time.
//
// A caller publishes its job and takes tasks itself, one after the other. So does each worker that runs. The caller
// returns when all tasks are done. So it waits for a worker only while that is inside a task, and for none to wake up.
// docs/decisions/workers.md says why.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "cpu/cpu.h"

namespace exllama::cpu {

class Workers {
 public:
  // What tests do to workers.
  struct Hooks {
    // Runs in a worker that has read a job, before each claim of a task.
    std::function<void(int32_t worker)> before_claim;
    // As if the system gave no more threads than these.
    int32_t most_threads = 1 << 30;
  };

  Workers();
  explicit Workers(const Hooks& hooks);
  // Ends the threads.
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Runs body(context, task, worker) for every task in [0, tasks), by the calling thread and at most threads - 1 workers.
  // All callers of a time share these threads: whoever calls while another does computes alone, in place of a worker.
  void run(int64_t tasks, Parallel::Body body, void* context, int32_t threads);

  // How many of so many threads would begin at once: the calling one, and the workers that look for a job just now. It
  // also wakes the others for what comes next, unless that was in vain lately.
  int32_t ready(int32_t threads);

  // Those of this process, for ever. A child of fork gets its own.
  static Workers& of_process();

 private:
  class Pool;
  std::unique_ptr<Pool> pool_;
};

}  // namespace exllama::cpu
