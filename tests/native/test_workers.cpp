// The threads of csrc/cpu/workers.h: who computes what, with workers that a test holds where it likes.
//
//   g++ -O2 -std=c++17 -pthread -Icsrc tests/native/test_workers.cpp csrc/cpu/workers.cpp && ./a.out
//
// Nothing here depends on how fast anything runs. A promise that is broken shows as a failed check, or as a test that
// never ends: the alarm ends it.
#include "cpu/workers.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using exllama::cpu::Workers;

int failures = 0;
long checks = 0;

void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

using Task = std::function<void(int64_t task, int32_t worker)>;

void run(Workers& workers, int64_t tasks, int32_t threads, const Task& task) {
  const auto call = [](void* context, int64_t index, int32_t worker) {
    (*static_cast<const Task*>(context))(index, worker);
  };
  workers.run(tasks, call, const_cast<Task*>(&task), threads);
}

void wait_until(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::yield();
}

// Tasks that wait for one another: they end only if each has a thread of its own.
std::vector<int32_t> run_at_once(Workers& workers, int32_t threads) {
  std::atomic<int32_t> inside{0};
  std::vector<int32_t> worker_of(static_cast<size_t>(threads));
  run(workers, threads, threads, [&](int64_t task, int32_t worker) {
    worker_of[static_cast<size_t>(task)] = worker;
    ++inside;
    wait_until([&] { return inside == threads; });
  });
  return worker_of;
}

void test_every_task_runs_once() {
  Workers workers;
  for (int32_t threads : {1, 2, 3, 8}) {
    for (int64_t tasks : {0, 1, 2, 5, 64, 1000}) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<int> runs(static_cast<size_t>(tasks), 0);
        std::vector<std::atomic<bool>> busy(static_cast<size_t>(threads));
        std::atomic<bool> wrong{false};
        run(workers, tasks, threads, [&](int64_t task, int32_t worker) {
          if (worker < 0 || worker >= threads || busy[static_cast<size_t>(worker)].exchange(true)) {
            wrong = true;
            return;
          }
          ++runs[static_cast<size_t>(task)];
          busy[static_cast<size_t>(worker)] = false;
        });
        const std::string text = std::to_string(tasks) + " tasks, " + std::to_string(threads) + " threads";
        expect(!wrong, text + ": two tasks at a time have different workers below the number of threads");
        expect(runs == std::vector<int>(static_cast<size_t>(tasks), 1), text + ": every task runs once");
      }
    }
  }
}

void test_as_many_threads_as_asked_for_compute_at_once() {
  Workers workers;
  for (int32_t threads : {2, 5, 1, 3, 2, 8}) {
    const std::vector<int32_t> ran = run_at_once(workers, threads);
    expect(std::set<int32_t>(ran.begin(), ran.end()).size() == ran.size(), "tasks at once have different workers");
    // Workers that are there from before stay out.
    std::set<std::thread::id> ids;
    std::vector<std::thread::id> id_of(1000);
    run(workers, 1000, threads,
        [&](int64_t task, int32_t) { id_of[static_cast<size_t>(task)] = std::this_thread::get_id(); });
    ids.insert(id_of.begin(), id_of.end());
    expect(ids.size() <= static_cast<size_t>(threads), "no more threads compute than were asked for");
  }
}

void test_more_tasks_than_claims() {
  Workers workers;
  constexpr int64_t kTasks = (int64_t{1} << 24) + 12345;
  int64_t sums[2] = {}, counts[2] = {};
  run(workers, kTasks, 2, [&](int64_t task, int32_t worker) {
    sums[worker] += task;
    ++counts[worker];
  });
  expect(counts[0] + counts[1] == kTasks, "millions of tasks: each runs");
  expect(sums[0] + sums[1] == kTasks * (kTasks - 1) / 2, "millions of tasks: each runs once");
}

// A stolen core.
void test_a_caller_does_not_wait_for_a_worker_that_never_claims() {
  std::atomic<int> held{0};
  std::atomic<bool> released{false};
  Workers workers({[&](int32_t) {
    ++held;
    wait_until([&] { return released.load(); });
  }});
  std::atomic<int> by_others{0};
  int64_t done = 0;
  // Until both workers are held, and once more.
  for (bool last = false; !last;) {
    last = held == 2;
    run(workers, 100, 3, [&](int64_t, int32_t worker) { worker == 0 ? ++done : ++by_others; });
  }
  expect(by_others == 0 && done % 100 == 0, "the caller computes all tasks while workers are held");
  released = true;
}

// The memory of a job is gone when its late worker goes on.
void test_a_late_worker_runs_no_task_of_a_job_that_ended() {
  std::atomic<int> held{0}, released{0};
  Workers workers({[&](int32_t) {
    const int number = ++held;
    wait_until([&] { return released >= number; });
  }});
  const auto job = [&](int64_t tasks, const std::function<void()>& first) {
    auto runs = std::make_unique<std::vector<std::atomic<int>>>(static_cast<size_t>(tasks));
    auto task = std::make_unique<Task>([&](int64_t index, int32_t) {
      if (++(*runs)[static_cast<size_t>(index)] == 1 && index == 0) first();
    });
    run(workers, tasks, 2, *task);
    for (const std::atomic<int>& count : *runs) expect(count == 1, "late worker: every task runs once");
  };
  const auto nothing = [] {};
  while (held == 0) job(1000, nothing);
  for (int64_t tasks : {3, 64, 2}) job(tasks, nothing);
  // The worker has read a job that is over. It goes on inside another one, of which it knows when it is held again.
  job(100, [&] {
    released = 1;
    wait_until([&] { return held == 2; });
  });
  released = 1 << 30;
  for (int repeat = 0; repeat < 1000; ++repeat) job(2 + repeat % 7, nothing);
}

void test_another_caller_computes_alone_in_place_of_a_worker() {
  std::atomic<bool> held{false}, released{false}, first_may_end{false};
  std::atomic<int> by_worker{0};
  Workers workers({[&](int32_t) {
    held = true;
    wait_until([&] { return released.load(); });
  }});
  std::thread first([&] {
    run(workers, 100, 2, [&](int64_t, int32_t worker) {
      if (worker != 0) ++by_worker;
      wait_until([&] { return first_may_end.load(); });
    });
  });
  wait_until([&] { return held.load(); });
  std::set<std::thread::id> ids;
  run(workers, 5, 2, [&](int64_t task, int32_t worker) {
    ids.insert(std::this_thread::get_id());
    expect(worker == 0, "a second caller is its own worker 0");
    if (task > 0) return;
    released = true;
    // A worker that stayed would claim a task now.
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
    wait_until([&] { return by_worker > 0 || std::chrono::steady_clock::now() > end; });
  });
  expect(ids == std::set<std::thread::id>{std::this_thread::get_id()}, "a second caller computes alone");
  expect(by_worker == 0, "a worker leaves when another caller comes");
  first_may_end = true;
  first.join();
}

void test_many_callers() {
  Workers workers;
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      for (int repeat = 0; repeat < 300; ++repeat) {
        std::vector<int64_t> out(static_cast<size_t>(1 + (caller + repeat) % 9), -1);
        run(workers, static_cast<int64_t>(out.size()), 1 + caller % 4,
            [&](int64_t task, int32_t) { out[static_cast<size_t>(task)] = task * caller; });
        for (size_t i = 0; i < out.size(); ++i) wrong += out[i] != static_cast<int64_t>(i) * caller;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "each of many callers gets its own results");
}

void test_a_task_may_call_again() {
  Workers workers;
  std::atomic<int> inner{0};
  run(workers, 8, 2, [&](int64_t, int32_t) { run(workers, 10, 2, [&](int64_t, int32_t) { ++inner; }); });
  expect(inner == 80, "calls from within tasks are computed");
}

void test_without_threads_the_caller_computes() {
  for (int32_t given : {0, 1}) {
    Workers::Hooks hooks;
    hooks.most_threads = given;
    Workers workers(hooks);
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::atomic<int> runs{0}, by_others{0};
      run(workers, 50, 4, [&](int64_t, int32_t worker) {
        ++runs;
        by_others += worker > given;
      });
      expect(runs == 50 && by_others == 0, "with the threads that the system gives, all tasks are computed");
    }
    expect(run_at_once(workers, 1 + given).size() == static_cast<size_t>(1 + given), "those that it gave compute");
  }
}

void test_workers_come_out_of_their_sleep() {
  Workers workers;
  for (int repeat = 0; repeat < 5; ++repeat) {
    run_at_once(workers, 6);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  expect(true, "");
}

// Subnormal numbers have one value, whoever computes.
void test_workers_round_as_their_caller_does() {
#if defined(__x86_64__)
  Workers workers;
  const unsigned before = _mm_getcsr();
  for (unsigned flush : {0u, 0x8040u, 0u}) {
    _mm_setcsr(before | flush);
    std::atomic<int32_t> inside{0}, wrong{0};
    run(workers, 3, 3, [&](int64_t, int32_t) {
      wrong += (_mm_getcsr() & 0x8040) != flush;
      ++inside;
      wait_until([&] { return inside == 3; });
    });
    expect(wrong == 0, "workers flush subnormal numbers as their caller does");
  }
  _mm_setcsr(before);
#endif
}

// ThreadSanitizer supports no threads in a child of a process with threads.
#if !defined(__SANITIZE_THREAD__)
int status_of_child() {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    run_at_once(Workers::of_process(), 3);
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

void test_a_child_has_workers_of_its_own() {
  run_at_once(Workers::of_process(), 3);
  expect(status_of_child() == 0, "a child that is forked after a call computes");
  std::atomic<bool> inside{false}, may_end{false};
  std::thread caller([&] {
    run(Workers::of_process(), 10, 3, [&](int64_t, int32_t) {
      inside = true;
      wait_until([&] { return may_end.load(); });
    });
  });
  wait_until([&] { return inside.load(); });
  expect(status_of_child() == 0, "a child that is forked during a call computes");
  may_end = true;
  caller.join();
  run_at_once(Workers::of_process(), 3);
}
#endif

}  // namespace

int main() {
  alarm(600);
  test_every_task_runs_once();
  test_as_many_threads_as_asked_for_compute_at_once();
  test_more_tasks_than_claims();
  test_a_caller_does_not_wait_for_a_worker_that_never_claims();
  test_a_late_worker_runs_no_task_of_a_job_that_ended();
  test_another_caller_computes_alone_in_place_of_a_worker();
  test_many_callers();
  test_a_task_may_call_again();
  test_without_threads_the_caller_computes();
  test_workers_come_out_of_their_sleep();
  test_workers_round_as_their_caller_does();
  // qemu's user mode (7.2) aborts where a process with threads forks.
#if !defined(__SANITIZE_THREAD__) && !defined(IN_QEMU)
  test_a_child_has_workers_of_its_own();
#endif
  run_at_once(Workers::of_process(), 2);
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures != 0;
}
