// Loads, stores, atomics and cp.async (PTX ISA 9.7.9). Every address is checked for alignment and, as far as it is
// known, for bounds, here, in the translated code, so that sanitizers see each access at its own place.
#pragma once

#include "thread.h"

namespace emu {

#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

[[noreturn, gnu::cold]] void bad_address(const char* problem, const char* space, u64 address, u32 bytes,
                                         const char* file, int line);

template <u32 Bytes> EMU_INLINE void check_alignment(const char* space, u64 address, const char* file, int line) {
    if (__builtin_expect(address & (Bytes - 1), 0)) bad_address("is misaligned", space, address, Bytes, file, line);
}
template <u32 Bytes> EMU_INLINE unsigned char* shared_at(u64 address, EMU_WHERE) {
    check_alignment<Bytes>("shared", address, file, line);
    if (__builtin_expect(address < kSharedBase || address + Bytes > kSharedBase + running.shared_bytes, 0)) {
        bad_address("is out of bounds", "shared", address, Bytes, file, line);
    }
    if (running.kernel->gap_count) check_gaps(address, Bytes, file, line);
    return running.shared + (address - kSharedBase);
}
void set_where(const char* file, int line);
template <u32 Bytes> EMU_INLINE unsigned char* global_at(u64 address, EMU_WHERE) {
    check_alignment<Bytes>("global", address, file, line);
    if (__builtin_expect(running.checks_global, 0)) {
        set_where(file, line);
        check_global(address, Bytes);
    }
    return reinterpret_cast<unsigned char*>(address);
}
template <u32 Bytes> EMU_INLINE unsigned char* const_at(u64 address, EMU_WHERE) {
    return global_at<Bytes>(address, file, line);
}
// Generic addresses of shared memory are those of the host's buffer, of local memory those of the fiber's stack.
EMU_INLINE bool in_shared(u64 address) {
    return address - reinterpret_cast<u64>(running.shared) < running.shared_bytes;
}
EMU_INLINE u64 shared_to_generic(u64 address) {
    return reinterpret_cast<u64>(running.shared) + (address - kSharedBase);
}
EMU_INLINE u64 generic_to_shared(u64 address) { return address - reinterpret_cast<u64>(running.shared) + kSharedBase; }
template <u32 Bytes> EMU_INLINE unsigned char* local_at(u64 address, EMU_WHERE) {
    check_alignment<Bytes>("local", address, file, line);
    if (!in_local(address, Bytes)) bad_address("is out of bounds", "local", address, Bytes, file, line);
    return reinterpret_cast<unsigned char*>(address);
}
template <u32 Bytes> EMU_INLINE unsigned char* generic_at(u64 address, EMU_WHERE) {
    if (in_shared(address)) return shared_at<Bytes>(generic_to_shared(address), file, line);
    if (in_local(address, Bytes)) return local_at<Bytes>(address, file, line);
    return global_at<Bytes>(address, file, line);
}

// .volatile and the ordered forms: a synchronization, to a race detector too, not a plain access.
template <class T> EMU_INLINE T load_ordered(const unsigned char* from) {
    return bit_cast<T>(__atomic_load_n(reinterpret_cast<const word_of<T>*>(from), __ATOMIC_ACQUIRE));
}
template <class T> EMU_INLINE void store_ordered(unsigned char* to, T value) {
    __atomic_store_n(reinterpret_cast<word_of<T>*>(to), bit_cast<word_of<T>>(value), __ATOMIC_RELEASE);
}

// --- atomics: the old value. `update` maps the old value to the new one; threads of one process never run at the same
// time.
template <class T, class Update> EMU_INLINE T atomic(unsigned char* at, Update update) {
    auto* word = reinterpret_cast<word_of<T>*>(at);
    const T old = bit_cast<T>(__atomic_load_n(word, __ATOMIC_RELAXED));
    __atomic_store_n(word, bit_cast<word_of<T>>(static_cast<T>(update(old))), __ATOMIC_RELAXED);
#ifdef EMU_TSAN
    atomic_is_done();
#endif
    return old;
}
template <class T> EMU_INLINE T atom_add(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return add(a, b); });
}
// In global memory float32 sums flush subnormals (PTX ISA, atom).
template <class T> EMU_INLINE T atom_add_ftz(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return ftz(add(ftz(a), ftz(b))); });
}
template <class T> EMU_INLINE T atom_min(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return min(a, b); });
}
template <class T> EMU_INLINE T atom_max(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return max(a, b); });
}
template <class T> EMU_INLINE T atom_and(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return a & b; });
}
template <class T> EMU_INLINE T atom_or(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return a | b; });
}
template <class T> EMU_INLINE T atom_xor(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return a ^ b; });
}
template <class T> EMU_INLINE T atom_exch(unsigned char* at, T b) {
    return atomic<T>(at, [=](T) { return b; });
}
template <class T> EMU_INLINE T atom_inc(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return a >= b ? T(0) : a + 1; });
}
template <class T> EMU_INLINE T atom_dec(unsigned char* at, T b) {
    return atomic<T>(at, [=](T a) { return a == 0 || a > b ? b : a - 1; });
}
template <class T> EMU_INLINE T atom_cas(unsigned char* at, T expected, T b) {
    return atomic<T>(at, [=](T a) { return a == expected ? b : a; });
}

// --- cp.async: the destination is undefined until the wait, so it is poisoned at once and written at the wait, the
// last legal moment. A reader that comes too early, and a writer that does not wait for readers of the old contents,
// both show.
void async_retire(Thread& thread, u32 groups_left,
                  void (*copy)(unsigned char* to, const unsigned char* from, u32 bytes, u32 from_bytes));

template <u32 Bytes> EMU_INLINE void cp_async(Thread& thread, u64 to, u64 from, u32 from_bytes, EMU_WHERE) {
    if (from_bytes > Bytes) bad_address("has a src-size beyond its cp-size", "global", from, from_bytes, file, line);
    check_alignment<Bytes>("global", from, file, line);
    unsigned char* target = shared_at<Bytes>(to, file, line);
    const auto* source = reinterpret_cast<const unsigned char*>(from);
    if (running.checks_global && from_bytes) {
        set_where(file, line);
        check_global(from, from_bytes);
    }
    for (u32 i = 0; i < Bytes; i += 4) store<u32>(target + i, ~0u);
    async_copy(thread, target, source, Bytes, from_bytes);
}
static inline void copy_now(unsigned char* to, const unsigned char* from, u32 bytes, u32 from_bytes) {
    for (u32 i = 0; i < bytes; ++i) to[i] = i < from_bytes ? from[i] : 0;
}
EMU_INLINE void async_wait(Thread& thread, u32 groups_left) { async_retire(thread, groups_left, copy_now); }

}  // namespace emu
