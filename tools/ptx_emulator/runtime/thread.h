// What translated kernels and the runtime share: the running thread, its block, barriers, collectives and faults.
#pragma once

#include "floating.h"

namespace emu {

constexpr u32 kWarp = 32;
// Shared addresses start above zero, so that a null or truncated pointer is out of bounds.
constexpr u32 kSharedBase = 1024;
// Backward branches that one thread may take: a loop that waits for another block would never end.
constexpr s64 kFuel = 1 << 28;

struct Thread {
    u32 tid[3];
    u32 lane;
    u32 warp;
    s64 fuel;
    bool has_waited;  // for the grids before, by griddepcontrol.wait
};

// The launch and the block that run now: blocks run one after another.
struct Running {
    u32 ntid[3];
    u32 nctaid[3];
    u32 ctaid[3];
    u32 shared_bytes;  // with the gaps
    unsigned char* shared;
    const unsigned char* parameters;
    const struct Kernel* kernel;
    bool overlaps;       // the grid before may still run, until a thread has waited
    bool checks_global;  // each access to global memory
};
extern Running running;

// What a launch needs to know of a translated .entry; written by the translator.
struct Parameter {
    u32 offset;
    u32 bytes;
};
// Of shared memory between two arrays, where no device has any: what leads out of an array must not meet the next one.
struct Gap {
    u32 begin, end;
};
struct Kernel {
    const char* name;
    void (*run)(Thread&);
    const Parameter* parameters;
    u32 parameter_count;
    u32 static_shared_bytes;
    u32 max_threads;  // of .maxntid or .reqntid; 0 when the kernel has none
    const Gap* gaps;
    u32 gap_count;
    u32 gap_bytes;
    int ptx_version;  // of its .target: 90 for sm_90
};
struct ModuleVariable {
    const char* name;
    unsigned char* address;
    u64 bytes;
};
void add_kernel(const Kernel* kernel);
void add_variable(const ModuleVariable& variable);

// --- memory (scheduler.cpp): the slow path of a checked access; returns when the range is allowed
void check_global(u64 address, u32 bytes);
void check_gaps(u64 address, u32 bytes, const char* file, int line);
bool in_local(u64 address, u32 bytes);

// --- barriers and collectives of the running thread. `site` is the instruction's line of PTX: threads meet at one
// site.
enum class Reduce { none, popc, and_, or_ };
u32 barrier(Thread& thread, u32 id, u32 threads, bool aligned, Reduce reduce, bool predicate, u32 site);
void barrier_arrive(Thread& thread, u32 id, u32 threads, u32 site);

// One lane's part of a warp collective: `in` is what it brings, `out` what it leaves with.
struct Exchange {
    u32 in[12];
    u32 out[4];
};
// Runs `combine` once, when all lanes of `mask` have arrived at `site`, over the lanes' exchanges.
using Combine = void (*)(Exchange* const lanes[kWarp], u32 mask);
void collective(Thread& thread, u32 mask, u32 site, Exchange& exchange, Combine combine);
void warp_barrier(Thread& thread, u32 mask, u32 site);
u32 active_mask(const Thread& thread);
void fence();
void atomic_is_done();

// griddepcontrol: the grids before have ended, or the next one may begin.
void wait_for_grids_before(Thread& thread);
void let_next_grid_begin(const Thread& thread, u32 site);

// --- cp.async of the running thread
void async_copy(Thread& thread, unsigned char* to, const unsigned char* from, u32 bytes, u32 from_bytes);
void async_commit(Thread& thread);

[[noreturn, gnu::cold]] void out_of_fuel();
// The fuel is the scheduler's, which gives the memory of a thread to one of the next block: no race of the kernel's.
#ifdef EMU_TSAN
#define EMU_UNSEEN [[gnu::no_sanitize("thread"), gnu::noinline]] inline
#else
#define EMU_UNSEEN EMU_INLINE
#endif
EMU_UNSEEN void burn(Thread& thread) {
    if (__builtin_expect(--thread.fuel < 0, 0)) out_of_fuel();
}

}  // namespace emu
