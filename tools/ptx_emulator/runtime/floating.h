// Floating-point instructions (PTX ISA 9.7.3 to 9.7.5), conversions and comparisons, one function of values per
// instruction. Each result is the exact one rounded once.
//
// What the device approximates (.approx, .full) is rounded correctly here. So a bound that needs the device's error of
// ex2, rcp, rsqrt, sqrt, sin, cos, lg2, tanh or div.full is not tested.
#pragma once

#include <cmath>

#include "integer.h"

namespace emu {

template <class T> using if_real = std::enable_if_t<is_real<T>, T>;
template <class T> using if_pair = std::enable_if_t<is_pair<T>, T>;

template <class T, class... Rest> EMU_INLINE bool any_nan(T a, Rest... rest) {
    const double value = to_double(a);
    if constexpr (sizeof...(rest) > 0) return value != value || any_nan(rest...);
    else return value != value;
}

// a + b and a * b + c in double are not always exact for bfloat16: rounding to odd makes the second rounding harmless.
EMU_INLINE double odd_sum(double a, double b) {
    const double sum = a + b;
    if (!(sum - sum == 0)) return sum;
    const double b_part = sum - a;
    const double error = (a - (sum - b_part)) + (b - b_part);
    u64 bits = bit_cast<u64>(sum);
    if (error == 0 || (bits & 1)) return sum;
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    return bit_cast<double>(bits);
}

template <class T> EMU_INLINE if_real<T> add(T a, T b) {
    if constexpr (is_half<T>) return narrow<T>(odd_sum(to_double(a), to_double(b)));
    else return a + b;
}
template <class T> EMU_INLINE if_real<T> sub(T a, T b) {
    if constexpr (is_half<T>) return narrow<T>(odd_sum(to_double(a), -to_double(b)));
    else return a - b;
}
template <class T> EMU_INLINE if_real<T> mul(T a, T b) {
    if constexpr (is_half<T>) return narrow<T>(to_double(a) * to_double(b));
    else return a * b;
}
template <class T> EMU_INLINE if_real<T> fma(T a, T b, T c) {
    if constexpr (is_half<T>) return narrow<T>(odd_sum(to_double(a) * to_double(b), to_double(c)));
    else if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
    else return __builtin_fma(a, b, c);
}
template <class T> EMU_INLINE if_real<T> neg(T a) {
    if constexpr (is_half<T>) return {static_cast<u16>(a.bits ^ 0x8000)};
    else return -a;
}
template <class T> EMU_INLINE if_real<T> abs(T a) {
    if constexpr (is_half<T>) return {static_cast<u16>(a.bits & 0x7fff)};
    else return std::fabs(a);
}
template <class T> EMU_INLINE bool sign_bit(T a) { return std::signbit(to_double(a)); }
template <class T> EMU_INLINE T canonical_nan() {
    if constexpr (is_half<T>) return {0x7fff};
    else if constexpr (sizeof(T) == 4) return bit_cast<float>(0x7fffffffu);
    else return bit_cast<double>(0x7fffffffffffffffull);
}
// +0 is larger than -0; a NaN gives way to a number.
template <class T> EMU_INLINE if_real<T> max(T a, T b) {
    if (any_nan(a)) return any_nan(b) ? canonical_nan<T>() : b;
    if (any_nan(b)) return a;
    if (to_double(a) == to_double(b)) return sign_bit(a) ? b : a;
    return to_double(a) > to_double(b) ? a : b;
}
template <class T> EMU_INLINE if_real<T> min(T a, T b) {
    if (any_nan(a)) return any_nan(b) ? canonical_nan<T>() : b;
    if (any_nan(b)) return a;
    if (to_double(a) == to_double(b)) return sign_bit(a) ? a : b;
    return to_double(a) < to_double(b) ? a : b;
}
template <class T> EMU_INLINE if_real<T> max_NaN(T a, T b) { return any_nan(a, b) ? canonical_nan<T>() : max(a, b); }
template <class T> EMU_INLINE if_real<T> min_NaN(T a, T b) { return any_nan(a, b) ? canonical_nan<T>() : min(a, b); }

template <class T> EMU_INLINE if_real<T> div(T a, T b) { return a / b; }
template <class T> EMU_INLINE if_real<T> rcp(T a) { return 1 / a; }
template <class T> EMU_INLINE if_real<T> sqrt(T a) { return std::sqrt(a); }
template <class T> EMU_INLINE if_real<T> rsqrt(T a) { return narrow<T>(1 / std::sqrt(to_double(a))); }
template <class T> EMU_INLINE if_real<T> ex2(T a) { return narrow<T>(std::exp2(to_double(a))); }
template <class T> EMU_INLINE if_real<T> lg2(T a) { return narrow<T>(std::log2(to_double(a))); }
template <class T> EMU_INLINE if_real<T> sin(T a) { return narrow<T>(std::sin(to_double(a))); }
template <class T> EMU_INLINE if_real<T> cos(T a) { return narrow<T>(std::cos(to_double(a))); }
template <class T> EMU_INLINE if_real<T> tanh(T a) { return narrow<T>(std::tanh(to_double(a))); }
EMU_INLINE f32 copysign(f32 a, f32 b) { return std::copysign(b, a); }
EMU_INLINE f64 copysign(f64 a, f64 b) { return std::copysign(b, a); }

// --- modifiers of operands and results
template <class T> EMU_INLINE if_real<T> ftz(T a) {
    if constexpr (std::is_same_v<T, f32>) {
        return (bit_cast<u32>(a) & 0x7f800000u) == 0 ? bit_cast<f32>(bit_cast<u32>(a) & 0x80000000u) : a;
    } else if constexpr (std::is_same_v<T, f16>) {
        return (a.bits & 0x7c00) == 0 ? f16{static_cast<u16>(a.bits & 0x8000)} : a;
    } else {
        return a;
    }
}
template <class T> EMU_INLINE if_real<T> sat(T a) {
    const double value = to_double(a);
    return value > 0 ? (value < 1 ? a : narrow<T>(1)) : narrow<T>(0);
}
template <class T> EMU_INLINE if_real<T> relu(T a) {
    return any_nan(a) ? canonical_nan<T>() : to_double(a) > 0 ? a : narrow<T>(0);
}

// --- packed pairs: each half by itself
#define EMU_PAIR_UNARY(name) \
    template <class T> EMU_INLINE if_pair<T> name(T a) { return pair<T>(name(low(a)), name(high(a))); }
#define EMU_PAIR_BINARY(name)                                         \
    template <class T> EMU_INLINE if_pair<T> name(T a, T b) {         \
        return pair<T>(name(low(a), low(b)), name(high(a), high(b))); \
    }
EMU_PAIR_UNARY(neg)
EMU_PAIR_UNARY(abs)
EMU_PAIR_UNARY(ex2)
EMU_PAIR_UNARY(tanh)
EMU_PAIR_UNARY(ftz)
EMU_PAIR_UNARY(sat)
EMU_PAIR_UNARY(relu)
EMU_PAIR_BINARY(add)
EMU_PAIR_BINARY(sub)
EMU_PAIR_BINARY(mul)
EMU_PAIR_BINARY(max)
EMU_PAIR_BINARY(min)
EMU_PAIR_BINARY(max_NaN)
EMU_PAIR_BINARY(min_NaN)
#undef EMU_PAIR_UNARY
#undef EMU_PAIR_BINARY
template <class T> EMU_INLINE if_pair<T> fma(T a, T b, T c) {
    return pair<T>(fma(low(a), low(b), low(c)), fma(high(a), high(b), high(c)));
}

// --- comparisons; the names ending in u are true for a NaN as well
template <class T> EMU_INLINE auto comparable(T a) {
    if constexpr (is_half<T>) return to_float(a);
    else return a;
}
template <class T> EMU_INLINE bool eq(T a, T b) { return comparable(a) == comparable(b); }
template <class T> EMU_INLINE bool ne(T a, T b) {
    return comparable(a) < comparable(b) || comparable(a) > comparable(b);
}
template <class T> EMU_INLINE bool lt(T a, T b) { return comparable(a) < comparable(b); }
template <class T> EMU_INLINE bool le(T a, T b) { return comparable(a) <= comparable(b); }
template <class T> EMU_INLINE bool gt(T a, T b) { return comparable(a) > comparable(b); }
template <class T> EMU_INLINE bool ge(T a, T b) { return comparable(a) >= comparable(b); }
template <class T> EMU_INLINE bool lo(T a, T b) { return a < b; }
template <class T> EMU_INLINE bool ls(T a, T b) { return a <= b; }
template <class T> EMU_INLINE bool hi(T a, T b) { return a > b; }
template <class T> EMU_INLINE bool hs(T a, T b) { return a >= b; }
template <class T> EMU_INLINE bool equ(T a, T b) { return !ne(a, b); }
template <class T> EMU_INLINE bool neu(T a, T b) { return !eq(a, b); }
template <class T> EMU_INLINE bool ltu(T a, T b) { return !ge(a, b); }
template <class T> EMU_INLINE bool leu(T a, T b) { return !gt(a, b); }
template <class T> EMU_INLINE bool gtu(T a, T b) { return !le(a, b); }
template <class T> EMU_INLINE bool geu(T a, T b) { return !lt(a, b); }
template <class T> EMU_INLINE bool num(T a, T b) { return !any_nan(a, b); }
template <class T> EMU_INLINE bool nan(T a, T b) { return any_nan(a, b); }

// What `set` writes for true: 1.0 in a float, all ones in an integer.
template <class T> EMU_INLINE T truth(bool value) {
    if constexpr (is_integer<T>) return value ? static_cast<T>(-1) : T(0);
    else return narrow<T>(value ? 1.0 : 0.0);
}
// testp
EMU_INLINE bool finite(f32 a) { return std::isfinite(a); }
EMU_INLINE bool infinite(f32 a) { return std::isinf(a); }
EMU_INLINE bool notanumber(f32 a) { return std::isnan(a); }
EMU_INLINE bool number(f32 a) { return !std::isnan(a); }
EMU_INLINE bool subnormal(f32 a) { return std::fpclassify(a) == FP_SUBNORMAL; }
EMU_INLINE bool normal(f32 a) { return std::isnormal(a); }

// --- conversions
enum class Round { nearest, zero, down, up };

template <Round Mode, class T> EMU_INLINE T round_to(double value) {
    T rounded = narrow<T>(value);
    if constexpr (Mode != Round::nearest) {
        const double got = to_double(rounded);
        const bool too_high = got > value && (Mode == Round::down || (Mode == Round::zero && value > 0));
        const bool too_low = got < value && (Mode == Round::up || (Mode == Round::zero && value < 0));
        if (too_high || too_low) {
            word_of<T> bits = bit_cast<word_of<T>>(rounded);
            if (got == 0) bits = static_cast<word_of<T>>((too_high ? word_of<T>(1) << (8 * sizeof(T) - 1) : 0) | 1);
            else bits = static_cast<word_of<T>>(bits + ((got > 0) == too_high ? -1 : 1));
            rounded = bit_cast<T>(bits);
        }
    }
    return rounded;
}
// Directed rounding of float32 arithmetic: the sum, rounded to odd in double, keeps what the second rounding needs.
template <Round Mode> EMU_INLINE f32 fma_rounded(f32 a, f32 b, f32 c) {
    return round_to<Mode, f32>(odd_sum(to_double(a) * to_double(b), to_double(c)));
}
template <Round Mode> EMU_INLINE f32 add_rounded(f32 a, f32 b) {
    return round_to<Mode, f32>(odd_sum(to_double(a), to_double(b)));
}
template <Round Mode> EMU_INLINE f32 sub_rounded(f32 a, f32 b) {
    return round_to<Mode, f32>(odd_sum(to_double(a), -to_double(b)));
}
template <Round Mode> EMU_INLINE f32 mul_rounded(f32 a, f32 b) {
    return round_to<Mode, f32>(to_double(a) * to_double(b));
}

template <Round Mode> EMU_INLINE double to_integral(double value) {
    if constexpr (Mode == Round::nearest) return std::nearbyint(value);
    else if constexpr (Mode == Round::zero) return std::trunc(value);
    else if constexpr (Mode == Round::down) return std::floor(value);
    else return std::ceil(value);
}
// Values out of range are clamped, NaN becomes 0.
template <class T> EMU_INLINE T to_integer(double value) {
    constexpr int magnitude_bits = 8 * sizeof(T) - std::is_signed_v<T>;
    const double limit = std::ldexp(1.0, magnitude_bits);
    if (value != value) return 0;
    if (value >= limit)
        return static_cast<T>(std::is_signed_v<T> ? ~(std::make_unsigned_t<T>(1) << magnitude_bits) : ~u64(0));
    if (value <= (std::is_signed_v<T> ? -limit : 0))
        return static_cast<T>(std::is_signed_v<T> ? std::make_unsigned_t<T>(1) << magnitude_bits : 0);
    return static_cast<T>(value);
}
template <class To, class From> EMU_INLINE To saturate_cast(From value) {
    const __int128 wide = value;
    constexpr int magnitude_bits = 8 * sizeof(To) - std::is_signed_v<To>;
    const __int128 most = (static_cast<__int128>(1) << magnitude_bits) - 1;
    const __int128 least = std::is_signed_v<To> ? -most - 1 : 0;
    return static_cast<To>(wide < least ? least : wide > most ? most : wide);
}
// Nearest with ties away from zero, 10 bits of fraction; the low 13 bits are zero.
EMU_INLINE u32 cvt_rna_tf32(f32 a) {
    const u32 bits = bit_cast<u32>(a);
    if (!std::isfinite(a)) return bits & 0xffffe000u;
    return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace emu
