// What warp-wide instructions do with the operands of their lanes (PTX ISA 9.7.9.8, 9.7.13, 9.7.15).
#include <climits>
#include <cmath>

#include "scheduler.h"
#include "warp.h"

namespace emu {

namespace {

template <class Function> void for_lanes(u32 mask, Function function) {
    for (u32 lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1) function(lane);
    }
}

enum class Mode { up, down, bfly, idx };

template <Mode mode> void shuffle(Exchange* const lanes[kWarp], u32 mask) {
    for_lanes(mask, [&](u32 lane) {
        const u32 b = lanes[lane]->in[1] & 31, clamp = lanes[lane]->in[2] & 31, segment = lanes[lane]->in[2] >> 8 & 31;
        const u32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        int source = 0;
        bool in_range = false;
        if constexpr (mode == Mode::up) {
            source = static_cast<int>(lane) - static_cast<int>(b);
            in_range = source >= static_cast<int>(last);
        } else if constexpr (mode == Mode::down) {
            source = static_cast<int>(lane + b);
            in_range = source <= static_cast<int>(last);
        } else if constexpr (mode == Mode::bfly) {
            source = static_cast<int>(lane ^ b);
            in_range = source <= static_cast<int>(last);
        } else {
            source = static_cast<int>(first | (b & ~segment));
            in_range = source <= static_cast<int>(last);
        }
        if (!in_range) source = static_cast<int>(lane);
        if (!lanes[source])
            fault("shfl.sync: lane %u reads lane %d, which is not in the mask 0x%08x", lane, source, mask);
        lanes[lane]->out[0] = lanes[source]->in[0];
        lanes[lane]->out[1] = in_range;
    });
}

template <class T, class Operation> void reduce(Exchange* const lanes[kWarp], u32 mask, Operation operation) {
    bool is_first = true;
    T total = 0;
    for_lanes(mask, [&](u32 lane) {
        const T value = static_cast<T>(lanes[lane]->in[0]);
        total = is_first ? value : operation(total, value);
        is_first = false;
    });
    for_lanes(mask, [&](u32 lane) { lanes[lane]->out[0] = static_cast<u32>(total); });
}

u64 matched(const Exchange& exchange) { return static_cast<u64>(exchange.in[1]) << 32 | exchange.in[0]; }

}  // namespace

Shuffled shfl(Thread& thread, Combine combine, u32 value, u32 lane, u32 clamp, u32 mask, u32 site) {
    Exchange exchange{{value, lane, clamp}, {}};
    collective(thread, mask, site, exchange, combine);
    return {exchange.out[0], exchange.out[1] != 0};
}

void combine_shfl_up(Exchange* const lanes[kWarp], u32 mask) { shuffle<Mode::up>(lanes, mask); }
void combine_shfl_down(Exchange* const lanes[kWarp], u32 mask) { shuffle<Mode::down>(lanes, mask); }
void combine_shfl_bfly(Exchange* const lanes[kWarp], u32 mask) { shuffle<Mode::bfly>(lanes, mask); }
void combine_shfl_idx(Exchange* const lanes[kWarp], u32 mask) { shuffle<Mode::idx>(lanes, mask); }
void combine_ballot(Exchange* const lanes[kWarp], u32 mask) {
    u32 votes = 0;
    for_lanes(mask, [&](u32 lane) { votes |= lanes[lane]->in[0] << lane; });
    for_lanes(mask, [&](u32 lane) { lanes[lane]->out[0] = votes; });
}
void combine_match_any(Exchange* const lanes[kWarp], u32 mask) {
    for_lanes(mask, [&](u32 lane) {
        u32 same = 0;
        for_lanes(mask, [&](u32 other) { same |= (matched(*lanes[other]) == matched(*lanes[lane])) << other; });
        lanes[lane]->out[0] = same;
    });
}
void combine_match_all(Exchange* const lanes[kWarp], u32 mask) {
    const u64 first = matched(*lanes[__builtin_ctz(mask)]);
    bool all = true;
    for_lanes(mask, [&](u32 lane) { all = all && matched(*lanes[lane]) == first; });
    for_lanes(mask, [&](u32 lane) { lanes[lane]->out[0] = all ? mask : 0; });
}
void combine_redux_add(Exchange* const lanes[kWarp], u32 mask) {
    reduce<u32>(lanes, mask, [](u32 a, u32 b) { return a + b; });
}
void combine_redux_and(Exchange* const lanes[kWarp], u32 mask) {
    reduce<u32>(lanes, mask, [](u32 a, u32 b) { return a & b; });
}
void combine_redux_or(Exchange* const lanes[kWarp], u32 mask) {
    reduce<u32>(lanes, mask, [](u32 a, u32 b) { return a | b; });
}
void combine_redux_xor(Exchange* const lanes[kWarp], u32 mask) {
    reduce<u32>(lanes, mask, [](u32 a, u32 b) { return a ^ b; });
}
void combine_redux_min_u32(Exchange* const lanes[kWarp], u32 mask) { reduce<u32>(lanes, mask, min<u32>); }
void combine_redux_max_u32(Exchange* const lanes[kWarp], u32 mask) { reduce<u32>(lanes, mask, max<u32>); }
void combine_redux_min_s32(Exchange* const lanes[kWarp], u32 mask) { reduce<s32>(lanes, mask, min<s32>); }
void combine_redux_max_s32(Exchange* const lanes[kWarp], u32 mask) { reduce<s32>(lanes, mask, max<s32>); }

// Lane 8i + r brought row r of matrix i. Lane l leaves with two elements of each: row l/4, columns 2(l%4) and the next,
// or, transposed, column l/4 of those rows.
template <u32 Matrices, bool Transposed> void combine_ldmatrix(Exchange* const lanes[kWarp], u32 mask) {
    for_lanes(mask, [&](u32 lane) {
        for (u32 matrix = 0; matrix < Matrices; ++matrix) {
            u32 word = 0;
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = Transposed ? 2 * (lane % 4) + half : lane / 4;
                const u32 column = Transposed ? lane / 4 : 2 * (lane % 4) + half;
                const u32 element = lanes[8 * matrix + row]->in[column / 2] >> (16 * (column % 2)) & 0xffff;
                word |= element << (16 * half);
            }
            lanes[lane]->out[matrix] = word;
        }
    });
}
template void combine_ldmatrix<1, false>(Exchange* const[kWarp], u32);
template void combine_ldmatrix<2, false>(Exchange* const[kWarp], u32);
template void combine_ldmatrix<4, false>(Exchange* const[kWarp], u32);
template void combine_ldmatrix<1, true>(Exchange* const[kWarp], u32);
template void combine_ldmatrix<2, true>(Exchange* const[kWarp], u32);
template void combine_ldmatrix<4, true>(Exchange* const[kWarp], u32);

// --- mma
namespace {

template <class Element> Element element_of(u32 word, u32 index) {
    return bit_cast<Element>(static_cast<word_of<Element>>(word >> (8 * sizeof(Element) * index)));
}
template <class Element> float operand_value(Element element) {
    if constexpr (std::is_same_v<Element, tf32>) {
        return bit_cast<float>(element.bits & 0xffffe000u);
    } else {
        if (std::is_same_v<Element, f16> && settings.mma_flushes_subnormals)
            return to_float(ftz(bit_cast<f16>(element)));
        return to_float(element);
    }
}

int exponent_of(float value) {
    const int biased = bit_cast<u32>(value) >> 23 & 0xff;
    return biased ? biased - 127 : std::ilogb(value);
}
double power_of_two(int exponent) { return bit_cast<double>(static_cast<u64>(1023 + exponent) << 52); }

// One step of a tensor core as it was measured on V100 and T4, the least exact of those that have been published. The
// source is Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021. Newer tensor cores
// keep more bits and add longer sums at once.
//
// Four exact products and the accumulator are aligned to the largest of their exponents. All bits below 2^-23 of it are
// cut off. The sum of the rest is exact, and its result is cut off, not rounded, to float32.
float truncating_step(const float* a, const float* b, float c) {
    constexpr int products = 4;
    double terms[products + 1];
    int largest = INT_MIN;
    for (int i = 0; i <= products; ++i) {
        const bool is_product = i < products;
        terms[i] = is_product ? static_cast<double>(a[i]) * b[i] : c;
        if (!std::isfinite(terms[i])) {
            double sum = c;
            for (int j = 0; j < products; ++j) sum += static_cast<double>(a[j]) * b[j];
            return static_cast<float>(sum);
        }
        if (terms[i] == 0) continue;
        // The exponent of a product is the sum of its factors' exponents: it is not normalized before alignment.
        const int exponent = is_product ? exponent_of(a[i]) + exponent_of(b[i]) : exponent_of(c);
        largest = exponent > largest ? exponent : largest;
    }
    if (largest == INT_MIN) return c;
    const double to_units = power_of_two(23 - largest);
    s64 sum = 0;
    for (double term : terms) sum += static_cast<s64>(term * to_units);  // the cast cuts off
    return round_to<Round::zero, float>(static_cast<double>(sum) * power_of_two(largest - 23));
}

// One rule holds for all element widths, with E elements in a register. Element i of register r in lane l belongs to row
// l/4 + 8(r%2) and column (l%4) E + i + 4E(r/2) of A. In B it belongs to a row with the number of that column, and to
// column l/4. Register r of C is row l/4 + 8(r/2), column 2(l%4) + r%2.
template <class Element, u32 K, class Value, class Convert>
void gather(Exchange* const lanes[kWarp], Value (&a)[16][K], Value (&b)[K][8], Convert convert) {
    constexpr u32 per_word = 4 / sizeof(Element);
    constexpr u32 a_words = 16 * K / kWarp / per_word, b_words = 8 * K / kWarp / per_word;
    for (u32 lane = 0; lane < kWarp; ++lane) {
        const u32 group = lane / 4, column = lane % 4 * per_word;
        for (u32 i = 0; i < per_word; ++i) {
            for (u32 r = 0; r < a_words; ++r) {
                a[group + 8 * (r % 2)][column + i + 4 * per_word * (r / 2)] =
                    convert(element_of<Element>(lanes[lane]->in[r], i));
            }
            for (u32 r = 0; r < b_words; ++r) {
                b[column + i + 4 * per_word * r][group] = convert(element_of<Element>(lanes[lane]->in[4 + r], i));
            }
        }
    }
}
template <class Function> void for_accumulators(Function function) {
    for (u32 lane = 0; lane < kWarp; ++lane) {
        for (u32 r = 0; r < 4; ++r) function(lane, r, lane / 4 + 8 * (r / 2), 2 * (lane % 4) + r % 2);
    }
}

template <class Element, u32 K> void mma_float(Exchange* const lanes[kWarp]) {
    alignas(32) float a[16][K], b[K][8], c[16][8];
    gather<Element, K>(lanes, a, b, operand_value<Element>);
    for_accumulators(
        [&](u32 lane, u32 r, u32 row, u32 column) { c[row][column] = bit_cast<float>(lanes[lane]->in[6 + r]); });
    if (settings.mma_truncates) {
        for (u32 row = 0; row < 16; ++row) {
            for (u32 column = 0; column < 8; ++column) {
                for (u32 k = 0; k < K; k += 4) {
                    const float b_part[4] = {b[k][column], b[k + 1][column], b[k + 2][column], b[k + 3][column]};
                    c[row][column] = truncating_step(&a[row][k], b_part, c[row][column]);
                }
            }
        }
    } else {
        for (u32 row = 0; row < 16; ++row) {
            for (u32 k = 0; k < K; ++k) {
                for (u32 column = 0; column < 8; ++column)
                    c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
            }
        }
    }
    for_accumulators(
        [&](u32 lane, u32 r, u32 row, u32 column) { lanes[lane]->out[r] = bit_cast<u32>(c[row][column]); });
}

template <class Element, u32 K> void mma_integer(Exchange* const lanes[kWarp]) {
    s32 a[16][K], b[K][8];
    s64 c[16][8];
    gather<Element, K>(lanes, a, b, [](Element element) { return static_cast<s32>(element); });
    for_accumulators(
        [&](u32 lane, u32 r, u32 row, u32 column) { c[row][column] = static_cast<s32>(lanes[lane]->in[6 + r]); });
    for (u32 row = 0; row < 16; ++row) {
        for (u32 k = 0; k < K; ++k) {
            for (u32 column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for_accumulators([&](u32 lane, u32 r, u32 row, u32 column) {
        const bool saturates = lanes[lane]->in[10];
        lanes[lane]->out[r] = static_cast<u32>(saturates ? saturate_cast<s32>(c[row][column]) : c[row][column]);
    });
}

}  // namespace

template <class Element, u32 K> void combine_mma(Exchange* const lanes[kWarp], u32 mask) {
    if (mask != ~0u) fault("mma.sync needs all 32 lanes, got 0x%08x", mask);
    if constexpr (std::is_integral_v<Element>) mma_integer<Element, K>(lanes);
    else mma_float<Element, K>(lanes);
}
template void combine_mma<f16, 8>(Exchange* const[kWarp], u32);
template void combine_mma<f16, 16>(Exchange* const[kWarp], u32);
template void combine_mma<bf16, 8>(Exchange* const[kWarp], u32);
template void combine_mma<bf16, 16>(Exchange* const[kWarp], u32);
template void combine_mma<tf32, 4>(Exchange* const[kWarp], u32);
template void combine_mma<tf32, 8>(Exchange* const[kWarp], u32);
template void combine_mma<s8, 16>(Exchange* const[kWarp], u32);
template void combine_mma<s8, 32>(Exchange* const[kWarp], u32);
template void combine_mma<u8, 16>(Exchange* const[kWarp], u32);
template void combine_mma<u8, 32>(Exchange* const[kWarp], u32);

}  // namespace emu
