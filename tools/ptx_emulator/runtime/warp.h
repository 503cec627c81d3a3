// Warp-wide instructions (PTX ISA 9.7.9.8, 9.7.13 and 9.7.15): each lane brings its operands, collectives.cpp combines
// them.
#pragma once

#include "memory.h"

namespace emu {

void combine_shfl_up(Exchange* const lanes[kWarp], u32 mask);
void combine_shfl_down(Exchange* const lanes[kWarp], u32 mask);
void combine_shfl_bfly(Exchange* const lanes[kWarp], u32 mask);
void combine_shfl_idx(Exchange* const lanes[kWarp], u32 mask);
void combine_ballot(Exchange* const lanes[kWarp], u32 mask);
void combine_match_any(Exchange* const lanes[kWarp], u32 mask);
void combine_match_all(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_add(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_and(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_or(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_xor(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_min_u32(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_max_u32(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_min_s32(Exchange* const lanes[kWarp], u32 mask);
void combine_redux_max_s32(Exchange* const lanes[kWarp], u32 mask);
template <u32 Matrices, bool Transposed> void combine_ldmatrix(Exchange* const lanes[kWarp], u32 mask);
template <class Element, u32 K> void combine_mma(Exchange* const lanes[kWarp], u32 mask);

struct Shuffled {
    u32 value;
    bool in_range;
};
// It is no part of the kernels: ThreadSanitizer would take an exchange for memory that thread blocks share, since the
// threads of the next one have the same stacks.
Shuffled shfl(Thread& thread, Combine combine, u32 value, u32 lane, u32 clamp, u32 mask, u32 site);
EMU_INLINE u32 ballot(Thread& thread, bool predicate, u32 mask, u32 site) {
    Exchange exchange{{predicate}, {}};
    collective(thread, mask, site, exchange, combine_ballot);
    return exchange.out[0];
}
EMU_INLINE bool vote_any(Thread& thread, bool predicate, u32 mask, u32 site) {
    return ballot(thread, predicate, mask, site) != 0;
}
EMU_INLINE bool vote_all(Thread& thread, bool predicate, u32 mask, u32 site) {
    return ballot(thread, predicate, mask, site) == mask;
}
EMU_INLINE bool vote_uni(Thread& thread, bool predicate, u32 mask, u32 site) {
    const u32 votes = ballot(thread, predicate, mask, site);
    return votes == 0 || votes == mask;
}
EMU_INLINE Shuffled match(Thread& thread, Combine combine, u64 value, u32 mask, u32 site) {
    Exchange exchange{{static_cast<u32>(value), static_cast<u32>(value >> 32)}, {}};
    collective(thread, mask, site, exchange, combine);
    return {exchange.out[0], exchange.out[0] != 0};
}
EMU_INLINE u32 redux(Thread& thread, Combine combine, u32 value, u32 mask, u32 site) {
    Exchange exchange{{value}, {}};
    collective(thread, mask, site, exchange, combine);
    return exchange.out[0];
}
// Lanes below 8 * Matrices read the row whose address they hold; the row is then dealt out to the warp.
template <u32 Matrices, bool Transposed>
EMU_INLINE Exchange ldmatrix(Thread& thread, u64 address, u32 site, EMU_WHERE) {
    Exchange exchange{};
    if (thread.lane < 8 * Matrices) {
        const unsigned char* row = shared_at<16>(address, file, line);
        for (u32 i = 0; i < 4; ++i) exchange.in[i] = load<u32>(row + 4 * i);
    }
    collective(thread, ~0u, site, exchange, combine_ldmatrix<Matrices, Transposed>);
    return exchange;
}
// D = A B + C of shape m16n8kK. `a` holds K*16, `b` K*8 elements per warp, `c` and `out` 16*8 words; integer sums wrap
// or saturate (.satfinite).
template <class Element, u32 K>
EMU_INLINE Exchange mma(Thread& thread, const u32* a, const u32* b, const u32* c, bool saturates, u32 site) {
    constexpr u32 per_word = 4 / sizeof(Element);
    constexpr u32 a_words = 16 * K / kWarp / per_word, b_words = 8 * K / kWarp / per_word;
    Exchange exchange{};
    for (u32 i = 0; i < a_words; ++i) exchange.in[i] = a[i];
    for (u32 i = 0; i < b_words; ++i) exchange.in[4 + i] = b[i];
    for (u32 i = 0; i < 4; ++i) exchange.in[6 + i] = c[i];
    exchange.in[10] = saturates;
    collective(thread, ~0u, site, exchange, combine_mma<Element, K>);
    return exchange;
}
struct tf32 {
    u32 bits;
};

}  // namespace emu
