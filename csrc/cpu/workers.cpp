#include "cpu/workers.h"

#include <pthread.h>
#include <signal.h>

#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#else
#include <semaphore.h>

#include <cerrno>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace exllama::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How long a worker looks for the next job before it sleeps. Waking it takes the caller microseconds, and the worker tens
// of them. Between two products of a decoder layer lie some tens.
constexpr auto kSpin = std::chrono::microseconds(100);
// How often it offers its core to other threads meanwhile.
constexpr auto kOffer = std::chrono::microseconds(5);
// How long it computes before it offers its core. The system's own turns are longer, and end anywhere, also in a task. A
// worker that gives way between tasks is not taken away inside one, where the caller would wait for it.
constexpr auto kTurn = std::chrono::microseconds(500);

// A worker that looked for a job this long ago still does.
constexpr auto kFresh = std::chrono::nanoseconds(3000);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// How this thread rounds, and whether it takes subnormal numbers for zero.
uint64_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;  // the flags of what happened are not part of it
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode(uint64_t mode) {
  if (mode == float_mode()) return;
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

// What a thread must know of a job to take part in it.
struct Job {
  uint64_t generation;
  Parallel::Body body;
  void* context;
  int64_t tasks;
  int64_t claims;           // each of tasks_per_claim tasks
  int64_t tasks_per_claim;  // one, unless there are millions
  int32_t threads;
  uint64_t float_mode;
};

// The present job, in memory that outlives it. A worker may come late and read one job while the next is written. Its
// claim then fails, since it names the generation: no body runs and no context is touched after its job is done.
class Board {
 public:
  // Only the caller whose turn it is may publish, after the last job is done.
  Job publish(int64_t tasks, Parallel::Body body, void* context, int32_t threads) {
    const int64_t tasks_per_claim = (tasks + kClosed - 1) / kClosed;
    const int64_t claims = (tasks + tasks_per_claim - 1) / tasks_per_claim;
    const Job job{(state_.load(std::memory_order_relaxed) >> kClaimBits) + 1,
                  body,
                  context,
                  tasks,
                  claims,
                  tasks_per_claim,
                  threads,
                  exllama::cpu::float_mode()};
    state_.store(job.generation << kClaimBits | kClosed, std::memory_order_relaxed);
    // Release, like acquire in `read`: who reads one of these and then claims by the old generation fails.
    body_.store(body, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    claims_.store(claims, std::memory_order_release);
    tasks_per_claim_.store(tasks_per_claim, std::memory_order_release);
    threads_.store(threads, std::memory_order_release);
    float_mode_.store(job.float_mode, std::memory_order_release);
    unfinished_.store(claims, std::memory_order_relaxed);
    // In one order with what `Parking` does: a worker that goes to sleep sees the job, or the caller sees it asleep.
    state_.store(job.generation << kClaimBits, std::memory_order_seq_cst);
    return job;
  }

  // Whether there are tasks to claim; then `job` is what they belong to, if a claim succeeds.
  bool read(Job& job) const {
    const uint64_t state = state_.load(std::memory_order_seq_cst);
    const auto claimed = static_cast<int64_t>(state & kClosed);
    if (claimed == kClosed) return false;
    job = {state >> kClaimBits,
           body_.load(std::memory_order_acquire),
           context_.load(std::memory_order_acquire),
           tasks_.load(std::memory_order_acquire),
           claims_.load(std::memory_order_acquire),
           tasks_per_claim_.load(std::memory_order_acquire),
           threads_.load(std::memory_order_acquire),
           float_mode_.load(std::memory_order_acquire)};
    return claimed < job.claims;
  }

  // Takes one claim of the job: its index, or -1 if none is left or the job is over.
  int64_t claim(const Job& job) {
    uint64_t state = state_.load(std::memory_order_relaxed);
    while (state >> kClaimBits == job.generation && static_cast<int64_t>(state & kClosed) < job.claims) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
        return static_cast<int64_t>(state & kClosed);
      }
    }
    return -1;
  }

  void run(const Job& job, int64_t claim, int32_t worker) {
    const int64_t end = std::min(job.tasks, (claim + 1) * job.tasks_per_claim);
    for (int64_t task = claim * job.tasks_per_claim; task < end; ++task) job.body(job.context, task, worker);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }

  // Whether all claims were taken and run.
  bool done() const { return unfinished_.load(std::memory_order_acquire) == 0; }

 private:
  // Generation and number of claims in one word. All ones for the latter: the job is being written.
  static constexpr int kClaimBits = 24;
  static constexpr int64_t kClosed = (int64_t{1} << kClaimBits) - 1;

  alignas(64) std::atomic<uint64_t> state_{static_cast<uint64_t>(kClosed)};
  alignas(64) std::atomic<Parallel::Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0}, claims_{0}, tasks_per_claim_{0};
  std::atomic<int32_t> threads_{0};
  std::atomic<uint64_t> float_mode_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
};

// Counts wake-ups. To post one takes no lock, so nobody waits for a thread that was stopped while it held one.
class Semaphore {
 public:
#if defined(__APPLE__)  // has no unnamed semaphores of POSIX
  Semaphore() : semaphore_(dispatch_semaphore_create(0)) {}
  ~Semaphore() { dispatch_release(semaphore_); }
  void post() { dispatch_semaphore_signal(semaphore_); }
  void wait() { dispatch_semaphore_wait(semaphore_, DISPATCH_TIME_FOREVER); }
#else
  Semaphore() { sem_init(&semaphore_, 0, 0); }
  ~Semaphore() { sem_destroy(&semaphore_); }
  void post() { sem_post(&semaphore_); }
  void wait() {
    while (sem_wait(&semaphore_) != 0 && errno == EINTR) {
    }
  }
#endif
  Semaphore(const Semaphore&) = delete;
  Semaphore& operator=(const Semaphore&) = delete;

 private:
#if defined(__APPLE__)
  dispatch_semaphore_t semaphore_;
#else
  sem_t semaphore_;
#endif
};

// Where one worker sleeps.
class Parking {
 public:
  // Sleeps until `wake`, unless there is a reason not to.
  template <typename Reason>
  void sleep_unless(const Reason& reason) {
    asleep_.store(true, std::memory_order_seq_cst);
    // If someone wakes it meanwhile, the wake-up is waited for all the same: it would end the next sleep.
    if (reason() && asleep_.exchange(false, std::memory_order_seq_cst)) return;
    wake_ups_.wait();
  }

  // Whether it was asleep, or about to be. Never waits.
  bool wake() {
    if (!asleep_.load(std::memory_order_seq_cst) || !asleep_.exchange(false, std::memory_order_seq_cst)) return false;
    wake_ups_.post();
    return true;
  }

 private:
  Semaphore wake_ups_;
  std::atomic<bool> asleep_{false};
};

// Signals are for the program's own threads, whose system calls they interrupt. Faults are for the thread that made them.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t signals;
    sigfillset(&signals);
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS, SIGPROF}) sigdelset(&signals, fault);
    pthread_sigmask(SIG_BLOCK, &signals, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

class Workers::Pool {
 public:
  explicit Pool(const Hooks& hooks) : hooks_(hooks) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  ~Pool() {
    ending_.store(true, std::memory_order_seq_cst);
    for (int32_t i = 1; i <= started_; ++i) {
      const std::unique_ptr<Worker> worker(workers_[static_cast<size_t>(i)].load(std::memory_order_relaxed));
      while (!worker->ended.load(std::memory_order_acquire)) {
        worker->parking.wake();
        std::this_thread::yield();
      }
      worker->thread.join();
    }
  }

  int32_t ready(int32_t threads) {
    int32_t count = 1;
    const Clock::time_point now = Clock::now();
    for (int32_t index = 1; index < std::min(threads, kMostThreads); ++index) {
      Worker* worker = workers_[static_cast<size_t>(index)].load(std::memory_order_acquire);
      if (worker == nullptr) {
        if (!has_job_.exchange(true, std::memory_order_acquire)) {
          start(threads - 1);
          has_job_.store(false, std::memory_order_release);
        }
        break;
      }
      if (now.time_since_epoch().count() - worker->looked_at.load(std::memory_order_relaxed) < kFresh.count()) {
        count += count == index;
      } else {
        worker->wake_if_it_pays();
      }
    }
    return count;
  }

  void run(int64_t tasks, Parallel::Body body, void* context, int32_t threads) {
    // Counts the callers: see `needed`.
    struct Present {
      explicit Present(std::atomic<int32_t>& count) : callers(count) {
        callers.fetch_add(1, std::memory_order_relaxed);
      }
      ~Present() { callers.fetch_sub(1, std::memory_order_relaxed); }
      std::atomic<int32_t>& callers;
    } const present(callers_);
    const auto others = static_cast<int32_t>(std::min<int64_t>({threads, tasks, kMostThreads}) - 1);
    if (others <= 0 || has_job_.exchange(true, std::memory_order_acquire)) {
      for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
      return;
    }
    start(others);
    const Job job = board_.publish(tasks, body, context, others + 1);
    next_to_wake_.store(1, std::memory_order_relaxed);
    wake_some(job);
    for (int64_t claim; (claim = board_.claim(job)) >= 0;) {
      board_.run(job, claim, 0);
      wake_some(job);
    }
    wait_for_claimed();
    has_job_.store(false, std::memory_order_release);
  }

 private:
  static constexpr int32_t kMostThreads = 1024, kMostInVain = 6;

  struct Worker {
    explicit Worker(int32_t number) : index(number) {}
    const int32_t index;
    Parking parking;
    std::thread thread;
    std::atomic<bool> ended{false};
    Clock::time_point idle_since{}, turn_began{};
    uint64_t left = 0;    // the generation that it takes no more part in
    bool helped = false;  // since it woke up
    // When it last looked for a job, in the clock's units: a thread whose core was taken away does not look.
    alignas(64) std::atomic<int64_t> looked_at{0};
    // Times in a row that it was woken for nothing, and for how many callers more it is left asleep.
    std::atomic<int32_t> woken_in_vain{0}, asleep_for{0};

    void wake_if_it_pays() {
      if (asleep_for.load(std::memory_order_relaxed) > 0) {
        asleep_for.fetch_sub(1, std::memory_order_relaxed);
      } else if (parking.wake()) {
        asleep_for.store((1 << woken_in_vain.load(std::memory_order_relaxed)) - 1, std::memory_order_relaxed);
      }
    }
  };

  // Each caller that computes alone takes the place of a worker.
  bool needed(const Worker& worker, const Job& job) const {
    return worker.index + callers_.load(std::memory_order_relaxed) - 1 < job.threads;
  }

  void serve(Worker& worker) {
    worker.idle_since = worker.turn_began = Clock::now();
    Job job;
    while (!ending_.load(std::memory_order_seq_cst)) {
      if (finds_job(worker, job)) {
        work(worker, job);
        continue;
      }
      for (int i = 0; i < 8; ++i) pause();
      const Clock::time_point now = Clock::now();
      worker.looked_at.store(now.time_since_epoch().count(), std::memory_order_relaxed);
      if (now - worker.idle_since > kSpin) {
        const int32_t in_vain = worker.woken_in_vain.load(std::memory_order_relaxed);
        worker.woken_in_vain.store(worker.helped ? 0 : std::min(in_vain + 1, kMostInVain), std::memory_order_relaxed);
        worker.helped = false;
        worker.parking.sleep_unless([&] { return ending_.load(std::memory_order_seq_cst) || finds_job(worker, job); });
        worker.idle_since = worker.turn_began = Clock::now();
      } else if (now - worker.turn_began > kOffer) {
        offer_core(worker);
      }
    }
    worker.ended.store(true, std::memory_order_release);
  }

  bool finds_job(const Worker& worker, Job& job) const { return board_.read(job) && job.generation != worker.left; }

  void work(Worker& worker, const Job& job) {
    set_float_mode(job.float_mode);
    for (;;) {
      if (Clock::now() - worker.turn_began > kTurn) offer_core(worker);
      if (hooks_.before_claim) hooks_.before_claim(worker.index);
      if (!needed(worker, job)) break;
      const int64_t claim = board_.claim(job);
      if (claim < 0) break;
      wake_some(job);
      board_.run(job, claim, worker.index);
      worker.idle_since = Clock::now();
      worker.helped = true;
    }
    worker.left = job.generation;
  }

  void offer_core(Worker& worker) {
    std::this_thread::yield();
    worker.turn_began = Clock::now();
  }

  // Whoever takes part wakes two sleepers at a time, so that no thread wakes many.
  void wake_some(const Job& job) {
    for (int woken = 0; woken < 2;) {
      if (next_to_wake_.load(std::memory_order_relaxed) >= job.threads) return;
      const int32_t index = next_to_wake_.fetch_add(1, std::memory_order_relaxed);
      if (index >= job.threads) return;
      Worker* worker = workers_[static_cast<size_t>(index)].load(std::memory_order_acquire);
      if (worker == nullptr) return;
      woken += worker->parking.wake();
    }
  }

  void wait_for_claimed() {
    for (int i = 0; i < 200; ++i) {
      if (board_.done()) return;
      pause();
    }
    // The worker may be waiting for this very core.
    while (!board_.done()) std::this_thread::yield();
  }

  // Only the caller that has the job starts threads.
  void start(int32_t count) {
    if (count <= started_ || calls_before_retry_-- > 0) return;
    const SignalsBlocked blocked;
    while (started_ < count) {
      auto worker = std::make_unique<Worker>(started_ + 1);
      try {
        if (started_ >= hooks_.most_threads)
          throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
        worker->thread = std::thread([this, pointer = worker.get()] { serve(*pointer); });
      } catch (const std::system_error&) {
        // Those that are there compute. Asking takes time, so it is not done at every call.
        calls_before_retry_ = kCallsBeforeRetry;
        return;
      }
#if defined(__linux__)
      pthread_setname_np(worker->thread.native_handle(), "exllama_ops");
#endif
      workers_[static_cast<size_t>(++started_)].store(worker.release(), std::memory_order_release);
    }
  }

  static constexpr int32_t kCallsBeforeRetry = 1000;

  Board board_;
  alignas(64) std::atomic<int32_t> next_to_wake_{0};
  alignas(64) std::atomic<int32_t> callers_{0};
  std::atomic<bool> has_job_{false};
  std::array<std::atomic<Worker*>, kMostThreads> workers_{};
  int32_t started_ = 0;
  int32_t calls_before_retry_ = 0;
  std::atomic<bool> ending_{false};
  const Hooks hooks_;
};

Workers::Workers() : Workers(Hooks()) {}
Workers::Workers(const Hooks& hooks) : pool_(std::make_unique<Pool>(hooks)) {}
Workers::~Workers() = default;

void Workers::run(int64_t tasks, Parallel::Body body, void* context, int32_t threads) {
  pool_->run(tasks, body, context, threads);
}

int32_t Workers::ready(int32_t threads) { return pool_->ready(threads); }

namespace {

std::atomic<Workers*> workers_of_process{nullptr};

// A child has none of its parent's threads, and what these held stays held. So it forgets them.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { workers_of_process.store(nullptr); });

}  // namespace

Workers& Workers::of_process() {
  Workers* workers = workers_of_process.load(std::memory_order_acquire);
  if (workers != nullptr) return *workers;
  // Never deleted: its threads may run until the process ends.
  auto made = std::make_unique<Workers>();
  if (workers_of_process.compare_exchange_strong(workers, made.get(), std::memory_order_acq_rel)) {
    return *made.release();
  }
  return *workers;
}

}  // namespace exllama::cpu
