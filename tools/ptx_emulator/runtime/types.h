// The value types of PTX, and how registers hold them. A register is a plain C++ scalar (unsigned, float, double or
// bool); get<T> reads one as the instruction's type, put writes one back. Both are casts of bits: they never convert
// values.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define EMU_INLINE static inline __attribute__((always_inline))

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using b128 = unsigned __int128;
using f32 = float;
using f64 = double;
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
struct f16x2 {
    u32 bits;
};
struct bf16x2 {
    u32 bits;
};

template <class To, class From> EMU_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <size_t Bytes> struct Word;
template <> struct Word<1> {
    using type = u8;
};
template <> struct Word<2> {
    using type = u16;
};
template <> struct Word<4> {
    using type = u32;
};
template <> struct Word<8> {
    using type = u64;
};
template <> struct Word<16> {
    using type = b128;
};
template <class T> using word_of = typename Word<sizeof(T)>::type;

// The low bits of a register, or of an immediate, as T.
template <class T, class Register> EMU_INLINE T get(Register value) {
    if constexpr (std::is_same_v<T, Register>) return value;
    else return bit_cast<T>(static_cast<word_of<T>>(bit_cast<word_of<Register>>(value)));
}

// A value into a register that is as wide or wider; signed integers are sign-extended, all else zero-extended.
template <class Register, class T> EMU_INLINE void put(Register& to, T value) {
    static_assert(sizeof(Register) >= sizeof(T));
    if constexpr (std::is_same_v<Register, T>) {
        to = value;
    } else if constexpr (std::is_integral_v<Register> && std::is_integral_v<T>) {
        to = static_cast<Register>(value);
    } else {
        to = bit_cast<Register>(static_cast<word_of<Register>>(bit_cast<word_of<T>>(value)));
    }
}

template <class T> EMU_INLINE T load(const unsigned char* from) { return *reinterpret_cast<const T*>(from); }
template <class T> EMU_INLINE void store(unsigned char* to, T value) { *reinterpret_cast<T*>(to) = value; }

// --- half precision. Conversions from double round once, to nearest even; NaN becomes the canonical 0x7fff.

EMU_INLINE float to_float(f16 value) { return static_cast<float>(bit_cast<_Float16>(value.bits)); }
EMU_INLINE float to_float(bf16 value) { return bit_cast<float>(static_cast<u32>(value.bits) << 16); }

// Rounding to odd keeps enough to round again without error.
EMU_INLINE float odd_float(double value) {
    float rounded = static_cast<float>(value);
    if (static_cast<double>(rounded) != value && value == value && rounded - rounded == 0) {
        u32 bits = bit_cast<u32>(rounded);
        const bool away = (rounded > value) == (value > 0);
        if (!(bits & 1)) bits += away ? -1 : 1;
        rounded = bit_cast<float>(bits);
    }
    return rounded;
}

template <class T> EMU_INLINE T narrow(double value) {
    if constexpr (std::is_same_v<T, f16>) {
        if (value != value) return {0x7fff};
        return {bit_cast<u16>(static_cast<_Float16>(value))};
    } else if constexpr (std::is_same_v<T, bf16>) {
        if (value != value) return {0x7fff};
        const u32 bits = bit_cast<u32>(odd_float(value));
        if ((bits & 0x7f800000u) == 0x7f800000u) return {static_cast<u16>(bits >> 16)};
        return {static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
    } else {
        return static_cast<T>(value);
    }
}

template <class T> struct Half;
template <> struct Half<f16x2> {
    using type = f16;
};
template <> struct Half<bf16x2> {
    using type = bf16;
};
template <class T> using half_of = typename Half<T>::type;

template <class T> EMU_INLINE half_of<T> low(T pair) { return {static_cast<u16>(pair.bits)}; }
template <class T> EMU_INLINE half_of<T> high(T pair) { return {static_cast<u16>(pair.bits >> 16)}; }
template <class T> EMU_INLINE T pair(half_of<T> low, half_of<T> high) {
    return {static_cast<u32>(low.bits) | static_cast<u32>(high.bits) << 16};
}

template <class T> inline constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T> inline constexpr bool is_pair = std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>;
template <class T> inline constexpr bool is_real = std::is_floating_point_v<T> || is_half<T>;

template <class T> EMU_INLINE double to_double(T value) {
    if constexpr (is_half<T>) return to_float(value);
    else return value;
}

}  // namespace emu
