// Runs a grid with one fiber per CUDA thread. Blocks run one after another, and threads are switched at barriers and
// warp collectives only. The order of blocks, and the order in which the threads of a block first run, is ascending,
// descending or random. Between two waits a thread runs alone, so memory is sequentially consistent here.
//
// With ThreadSanitizer each fiber is a thread to the detector, and what CUDA does not order is a race. EMU_TSAN is
// defined then; this file itself is built without the sanitizer.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>

#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#ifdef EMU_ASAN
extern "C" void __asan_unpoison_memory_region(void const volatile* address, size_t size);
#endif

#ifndef __x86_64__
#error "the fiber switch is written for x86-64"
#endif

namespace emu {

Running running;
Settings settings;
std::vector<Range> ranges, variable_ranges;
bool check_ranges = false;
std::string fault_text;

namespace {

// Saves the callee-saved registers of the ABI on the running stack, and goes on where `to` was saved.
extern "C" void emu_switch_stack(void** from, void* to);
asm(R"(
.text
.hidden emu_switch_stack
.globl emu_switch_stack
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr u32 kBarriers = 16;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    u32 bytes, from_bytes;
};

enum class State { ready, barrier, collective, done };

struct Fiber {
    Thread thread;
    State state;
    u32 site;  // where it waits
    u32 result;
    Exchange* exchange;
    bool has_fenced;
    void* stack_pointer;
    unsigned char* stack;
    std::vector<Copy> open_copies;  // of cp.async, not committed
    std::deque<std::vector<Copy>> committed_copies;
#ifdef EMU_TSAN
    void* tsan;
#endif
};

// To the race detector, threads that synchronize release into an address and acquire from it. Each barrier of each
// block has addresses of its own, or the block would seem to come after earlier ones. It has two, used in turn, or a
// thread that is already at the next barrier would seem to come before one that has not left this one.
struct Sync {
    u32 index;
    u32 generation;
};

struct Barrier {
    u32 arrived, expected, votes_true;
    std::vector<Fiber*> waiting;
    std::map<u32, u32> site_of_warp;
    Sync sync;
};

struct Group {
    u32 mask, site, arrived;
    Combine combine;
};
struct Warp {
    std::vector<Group> groups;
    Sync sync;
};

std::vector<std::unique_ptr<Fiber>> fibers;
u32 fiber_count;
u32 done_count;
std::vector<Fiber*> ready;  // a ring
size_t ready_first, ready_count;
Barrier barriers[kBarriers];
std::vector<Warp> warps;
u64 block_serial;
Fiber* current;
void* main_stack_pointer;
char fence_address;
#ifdef EMU_TSAN
void* main_tsan;
char end_address;
#endif

void acquire([[maybe_unused]] void* at) {
#ifdef EMU_TSAN
    __tsan_acquire(at);
#endif
}
void release([[maybe_unused]] void* at) {
#ifdef EMU_TSAN
    __tsan_release(at);
#endif
}

// The scheduler's own containers are shared by all fibers: malloc and memmove, which the detector sees, are not theirs.
struct Unseen {
#ifdef EMU_TSAN
    Unseen() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Unseen() {}
#endif
};

void* address_of([[maybe_unused]] const Sync& sync) {
#ifdef EMU_TSAN
    constexpr size_t bytes = size_t(1) << 32;  // of address space, never touched
    constexpr u32 per_block = kBarriers + kWarp;
    static char* const region =
        static_cast<char*>(mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return region + ((block_serial * per_block + sync.index) * 2 + (sync.generation & 1)) * 8 % bytes;
#else
    return nullptr;
#endif
}

void push_ready(Fiber* fiber) {
    fiber->state = State::ready;
    ready[(ready_first + ready_count++) % ready.size()] = fiber;
}

void to_main() {
    void* ignored;
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(main_tsan, 1);
#endif
    emu_switch_stack(current ? &current->stack_pointer : &ignored, main_stack_pointer);
}

const char* name_of(State state) {
    switch (state) {
        case State::ready: return "ready";
        case State::barrier: return "a barrier";
        case State::collective: return "a warp collective";
        case State::done: return "its end";
    }
    return "";
}

std::string where_all_are() {
    std::map<std::string, u32> counts;
    for (u32 i = 0; i < fiber_count; ++i) {
        const Fiber& fiber = *fibers[i];
        std::string at = name_of(fiber.state);
        if (fiber.state == State::barrier || fiber.state == State::collective)
            at += " at line " + std::to_string(fiber.site);
        ++counts[at];
    }
    std::string text;
    for (const auto& [at, count] : counts) text += (text.empty() ? "" : ", ") + std::to_string(count) + " at " + at;
    return text;
}

void next_fiber() {
    if (ready_count == 0) {
        if (done_count < fiber_count) fault("deadlock: threads wait for each other: %s", where_all_are().c_str());
        to_main();
        return;
    }
    Fiber* const from = current;
    Fiber* const to = ready[ready_first];
    ready_first = (ready_first + 1) % ready.size();
    --ready_count;
    if (from == to) return;
    current = to;
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(to->tsan, 1);
#endif
    emu_switch_stack(&from->stack_pointer, to->stack_pointer);
}

void fiber_main() {
    running.kernel->run(current->thread);
    if (running.overlaps && !current->thread.has_waited)
        fault("%s overlaps with the grid before, and a thread ends without griddepcontrol.wait", running.kernel->name);
#ifdef EMU_TSAN
    __tsan_release(&end_address);
#endif
    current->state = State::done;
    ++done_count;
    next_fiber();
    abort();  // a finished fiber is never switched to
}

Fiber& fiber_of(const Thread& thread) { return *reinterpret_cast<Fiber*>(const_cast<Thread*>(&thread)); }
static_assert(offsetof(Fiber, thread) == 0);

void prepare(Fiber& fiber, u32 index, Extent block) {
    if (!fiber.stack) {
        void* memory =
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) abort();
        mprotect(memory, kGuardBytes, PROT_NONE);
        fiber.stack = static_cast<unsigned char*>(memory);
    }
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(fiber.stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
    fiber.thread = {{index % block.x, index / block.x % block.y, index / (block.x * block.y)},
                    index % kWarp,
                    index / kWarp,
                    kFuel,
                    false};
    fiber.has_fenced = false;
    fiber.open_copies.clear();
    fiber.committed_copies.clear();
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    *--top = nullptr;  // a return address of fiber_main, which also aligns its frame
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#ifdef EMU_TSAN
    fiber.tsan = __tsan_create_fiber(0);
#endif
}

std::vector<u64> in_order(u64 count, u64 salt) {
    std::vector<u64> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (settings.order == Order::descending) std::reverse(order.begin(), order.end());
    if (settings.order == Order::random) {
        std::mt19937_64 random(settings.seed * 0x9e3779b97f4a7c15ull + salt);
        std::shuffle(order.begin(), order.end(), random);
    }
    return order;
}

void run_block(Extent block, u64 salt) {
    fiber_count = block.x * block.y * block.z;
    done_count = 0;
    while (fibers.size() < fiber_count) fibers.push_back(std::make_unique<Fiber>());
    ready.assign(fiber_count, nullptr);
    ready_first = ready_count = 0;
    ++block_serial;
    for (u32 i = 0; i < kBarriers; ++i) {
        barriers[i] = {};
        barriers[i].sync.index = i;
    }
    warps.assign((fiber_count + kWarp - 1) / kWarp, {});
    for (u32 i = 0; i < warps.size(); ++i) warps[i].sync.index = kBarriers + i;
    for (u32 i = 0; i < fiber_count; ++i) prepare(*fibers[i], i, block);
    for (u64 i : in_order(fiber_count, salt)) push_ready(fibers[i].get());
    Fiber start;  // stands for the host's stack in the first switch
    start.state = State::done;
    current = &start;
    Fiber* const first = ready[0];
    ready_first = 1 % ready.size();
    --ready_count;
    current = first;
#ifdef EMU_TSAN
    main_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(first->tsan, 1);
#endif
    emu_switch_stack(&main_stack_pointer, first->stack_pointer);
    current = nullptr;
#ifdef EMU_TSAN
    for (u32 i = 0; i < fiber_count; ++i) __tsan_destroy_fiber(fibers[i]->tsan);
#endif
}

std::string describe_thread() {
    if (!current) return "";
    const u32* t = current->thread.tid;
    const u32* b = running.ctaid;
    char text[200];
    snprintf(text, sizeof text, " in block (%u, %u, %u), thread (%u, %u, %u) of ", b[0], b[1], b[2], t[0], t[1], t[2]);
    return std::string(text) + running.kernel->name;
}

}  // namespace

void fault(const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (fault_text.empty()) fault_text = text + describe_thread();
    to_main();
    abort();  // a fiber with a fault is never switched to
}

void out_of_fuel() {
    fault("%lld backward branches: a loop that does not end, or waits for a block that has not run",
          static_cast<long long>(kFuel));
}

// --- addresses
static const char* where_file = "";
static int where_line;
void set_where(const char* file, int line) {
    where_file = file;
    where_line = line;
}
void bad_address(const char* problem, const char* space, u64 address, u32 bytes, const char* file, int line) {
    fault("%s:%d: a %s access of %u bytes at 0x%llx %s", file, line, space, bytes,
          static_cast<unsigned long long>(address), problem);
}
void check_global(u64 address, u32 bytes) {
    if (running.overlaps && !current->thread.has_waited)
        bad_address("comes before griddepcontrol.wait", "global", address, bytes, where_file, where_line);
    if (!check_ranges) return;
    for (const std::vector<Range>* list : {&ranges, &variable_ranges}) {
        for (const Range& range : *list) {
            if (address >= range.begin && address + bytes <= range.end) return;
        }
    }
    bad_address("is outside of all registered memory", "global", address, bytes, where_file, where_line);
}
void check_gaps(u64 address, u32 bytes, const char* file, int line) {
    for (u32 i = 0; i < running.kernel->gap_count; ++i) {
        const Gap& gap = running.kernel->gaps[i];
        if (address < kSharedBase + gap.end && address + bytes > kSharedBase + gap.begin)
            bad_address("leads out of its array", "shared", address, bytes, file, line);
    }
}
bool in_local(u64 address, u32 bytes) {
    const u64 stack = reinterpret_cast<u64>(current->stack);
    return address >= stack && address + bytes <= stack + kStackBytes;
}

// --- barriers
namespace {

void arrive(Barrier& barrier, Fiber& fiber, u32 id, u32 threads, bool aligned, u32 site) {
    const u32 expected = threads ? threads : fiber_count;
    if (threads % kWarp || threads > fiber_count)
        fault("line %u: barrier %u for %u threads: not a number of whole warps of the block", site, id, threads);
    if (barrier.arrived && barrier.expected != expected)
        fault("line %u: barrier %u is waited for by %u and by %u threads", site, id, barrier.expected, expected);
    if (!threads && done_count)
        fault("line %u: divergent barrier %u: %u threads have returned and will not arrive", site, id, done_count);
    barrier.expected = expected;
    const auto [first, is_new] = barrier.site_of_warp.try_emplace(fiber.thread.warp, site);
    if (aligned && !is_new && first->second != site) {
        fault("divergent barrier %u: one warp waits at line %u and at line %u", id, first->second, site);
    }
    ++barrier.arrived;
    release(address_of(barrier.sync));
}

Barrier& barrier_of(u32 id, u32 site) {
    if (id >= kBarriers) fault("line %u: barrier %u of %u", site, id, kBarriers);
    return barriers[id];
}

void open_if_complete(Barrier& barrier) {
    if (barrier.arrived < barrier.expected) return;
    for (Fiber* fiber : barrier.waiting) {
        fiber->result = barrier.votes_true;
        push_ready(fiber);
    }
    barrier.waiting.clear();
    barrier.site_of_warp.clear();
    barrier.arrived = barrier.votes_true = 0;
    ++barrier.sync.generation;
}

}  // namespace

u32 barrier(Thread& thread, u32 id, u32 threads, bool aligned, Reduce reduce, bool predicate, u32 site) {
    const Unseen unseen;
    Fiber& fiber = fiber_of(thread);
    Barrier& barrier = barrier_of(id, site);
    arrive(barrier, fiber, id, threads, aligned, site);
    const u32 expected = barrier.expected;
    void* const sync = address_of(barrier.sync);
    barrier.votes_true += predicate;
    barrier.waiting.push_back(&fiber);
    fiber.state = State::barrier;
    fiber.site = site;
    open_if_complete(barrier);
    next_fiber();
    acquire(sync);
    if (reduce == Reduce::and_) return fiber.result == expected;
    if (reduce == Reduce::or_) return fiber.result != 0;
    return fiber.result;
}

void barrier_arrive(Thread& thread, u32 id, u32 threads, u32 site) {
    const Unseen unseen;
    Barrier& barrier = barrier_of(id, site);
    arrive(barrier, fiber_of(thread), id, threads, true, site);
    open_if_complete(barrier);
}

// --- warp collectives
void collective(Thread& thread, u32 mask, u32 site, Exchange& exchange, Combine combine) {
    const Unseen unseen;
    Fiber& fiber = fiber_of(thread);
    Warp& warp = warps[thread.warp];
    const u32 first = thread.warp * kWarp;
    const u32 lanes = fiber_count - first < kWarp ? fiber_count - first : kWarp;
    if (!(mask >> thread.lane & 1))
        fault("line %u: lane %u is not in the mask 0x%08x that it names", site, thread.lane, mask);
    if (lanes < kWarp && mask >> lanes) {
        if (mask != ~0u) fault("line %u: the mask 0x%08x names lanes that do not exist", site, mask);
        mask &= (1u << lanes) - 1;
    }
    for (u32 lane = 0; done_count && lane < lanes; ++lane) {
        if ((mask >> lane & 1) && fibers[first + lane]->state == State::done) {
            fault("line %u: lane %u of the mask 0x%08x has returned", site, lane, mask);
        }
    }
    fiber.exchange = &exchange;
    fiber.site = site;
    auto group = std::find_if(warp.groups.begin(), warp.groups.end(),
                              [&](const Group& g) { return g.mask == mask && g.site == site; });
    if (group == warp.groups.end()) group = warp.groups.insert(group, {mask, site, 0, combine});
    if (group->combine != combine) fault("line %u: two collectives at one place", site);
    group->arrived |= 1u << thread.lane;
    void* const sync = address_of(warp.sync);
    if (!combine) release(sync);
    if (group->arrived == mask) {
        warp.groups.erase(group);
        if (combine) {
            Exchange* brought[kWarp] = {};
            for (u32 lane = 0; lane < lanes; ++lane) {
                if (mask >> lane & 1) brought[lane] = fibers[first + lane]->exchange;
            }
            combine(brought, mask);
        } else {
            ++warp.sync.generation;
        }
        for (u32 lane = 0; lane < lanes; ++lane) {
            if ((mask >> lane & 1) && lane != thread.lane) push_ready(fibers[first + lane].get());
        }
    } else {
        fiber.state = State::collective;
        next_fiber();
    }
    if (!combine) acquire(sync);
}

void warp_barrier(Thread& thread, u32 mask, u32 site) {
    Exchange none;
    collective(thread, mask, site, none, nullptr);
}

// The lanes that have not returned: threads run alone between two waits, so which of them are converged is not known.
u32 active_mask(const Thread& thread) {
    u32 mask = 0;
    for (u32 lane = 0; lane < kWarp && thread.warp * kWarp + lane < fiber_count; ++lane) {
        if (fibers[thread.warp * kWarp + lane]->state != State::done) mask |= 1u << lane;
    }
    return mask;
}

// To a race detector all fences are one, and an atomic operation after a fence is a release: a thread that has seen it
// and passes a fence itself comes after it. It may miss a race between threads that both pass fences, and reports no
// false one.
void fence() {
    current->has_fenced = true;
    acquire(&fence_address);
    release(&fence_address);
}
void atomic_is_done() {
    if (current->has_fenced) release(&fence_address);
}

// --- griddepcontrol
void wait_for_grids_before(Thread& thread) { thread.has_waited = true; }
// What begins then waits for this grid, and not for those before it.
void let_next_grid_begin(const Thread& thread, u32 site) {
    if (running.overlaps && !thread.has_waited)
        fault("line %u: griddepcontrol.launch_dependents comes before griddepcontrol.wait", site);
}

// --- cp.async
void async_copy(Thread& thread, unsigned char* to, const unsigned char* from, u32 bytes, u32 from_bytes) {
    const Unseen unseen;
    fiber_of(thread).open_copies.push_back({to, from, bytes, from_bytes});
}
void async_commit(Thread& thread) {
    const Unseen unseen;
    Fiber& fiber = fiber_of(thread);
    fiber.committed_copies.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
}
void async_retire(Thread& thread, u32 groups_left, void (*copy)(unsigned char*, const unsigned char*, u32, u32)) {
    Fiber& fiber = fiber_of(thread);
    while (fiber.committed_copies.size() > groups_left) {
        // The copies themselves are the thread's accesses, and seen.
        for (const Copy& each : fiber.committed_copies.front()) copy(each.to, each.from, each.bytes, each.from_bytes);
        const Unseen unseen;
        fiber.committed_copies.pop_front();
    }
}

// --- the grid
// The parameters where 32 bits address them: a kernel may take the address of one into a register of 32 bits.
const unsigned char* in_low_memory(const Kernel& kernel, const unsigned char* parameters) {
    constexpr size_t kParameterBytes = 32768;
    static void* const low =
        mmap(nullptr, kParameterBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low == MAP_FAILED) {
        perror("emulator: no memory below 4 GiB for a kernel's parameters");
        abort();
    }
    if (kernel.parameter_count > 0) {
        const Parameter& last = kernel.parameters[kernel.parameter_count - 1];
        memcpy(low, parameters, last.offset + last.bytes);
    }
    return static_cast<const unsigned char*>(low);
}

void run_grid(const Kernel& kernel, Extent grid, Extent block, u32 shared_bytes, const unsigned char* parameters,
              bool overlaps) {
    parameters = in_low_memory(kernel, parameters);
    const u64 blocks = u64(grid.x) * grid.y * grid.z;
    shared_bytes += kernel.gap_bytes;
    // Fresh pages for each launch under a detector of races: it forgets what it knows of an address that is mapped
    // anew.
    const size_t capacity = (shared_bytes + 4095) / 4096 * 4096 + 4096;
    for (const u64 block_index : settings.only_last_block ? std::vector<u64>{blocks - 1} : in_order(blocks, blocks)) {
        static unsigned char* shared = nullptr;
        static size_t shared_capacity = 0;
#ifdef EMU_TSAN
        if (shared) munmap(shared, shared_capacity);
        shared = nullptr;
#endif
        if (!shared || shared_capacity < capacity) {
            if (shared) munmap(shared, shared_capacity);
            shared = static_cast<unsigned char*>(
                mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            shared_capacity = capacity;
        }
        memset(shared, 0xff, shared_bytes);
        running = {{block.x, block.y, block.z},
                   {grid.x, grid.y, grid.z},
                   {u32(block_index % grid.x), u32(block_index / grid.x % grid.y), u32(block_index / grid.x / grid.y)},
                   shared_bytes,
                   shared,
                   parameters,
                   &kernel,
                   overlaps,
                   overlaps || check_ranges};
        run_block(block, block_index);
        if (!fault_text.empty()) break;
    }
#ifdef EMU_TSAN
    __tsan_acquire(&end_address);
#endif
}

}  // namespace emu
