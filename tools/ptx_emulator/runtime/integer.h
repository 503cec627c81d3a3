// Integer and bit instructions (PTX ISA 9.7.1 and 9.7.8), one function of values per instruction. Built with -fwrapv.
#pragma once

#include "types.h"

namespace emu {

[[noreturn, gnu::cold]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T> struct Wider;
template <> struct Wider<u16> {
    using type = u32;
};
template <> struct Wider<s16> {
    using type = s32;
};
template <> struct Wider<u32> {
    using type = u64;
};
template <> struct Wider<s32> {
    using type = s64;
};
template <> struct Wider<u64> {
    using type = unsigned __int128;
};
template <> struct Wider<s64> {
    using type = __int128;
};
template <class T> using wider = typename Wider<T>::type;

template <class T> inline constexpr bool is_integer = std::is_integral_v<T> && !std::is_same_v<T, bool>;
template <class T> using if_integer = std::enable_if_t<is_integer<T>, T>;

template <class T> EMU_INLINE if_integer<T> add(T a, T b) { return static_cast<T>(a + b); }
template <class T> EMU_INLINE if_integer<T> sub(T a, T b) { return static_cast<T>(a - b); }
template <class T> EMU_INLINE wider<T> mul_wide(T a, T b) {
    return static_cast<wider<T>>(static_cast<wider<T>>(a) * b);
}
template <class T> EMU_INLINE if_integer<T> mul_lo(T a, T b) { return static_cast<T>(mul_wide(a, b)); }
template <class T> EMU_INLINE if_integer<T> mul_hi(T a, T b) {
    return static_cast<T>(mul_wide(a, b) >> (8 * sizeof(T)));
}
template <class T> EMU_INLINE T mul24_lo(T a, T b) {
    constexpr int unused = 8;
    const T low_a = static_cast<T>(static_cast<T>(static_cast<u32>(a) << unused) >> unused);
    const T low_b = static_cast<T>(static_cast<T>(static_cast<u32>(b) << unused) >> unused);
    return static_cast<T>(mul_wide(low_a, low_b));
}
// The result of a division by zero is unspecified on the device: here it is a fault.
template <class T> EMU_INLINE if_integer<T> div(T a, T b) {
    if (b == 0) fault("integer division by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-a);
    return static_cast<T>(a / b);
}
template <class T> EMU_INLINE if_integer<T> rem(T a, T b) {
    if (b == 0) fault("integer remainder by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
}
template <class T> EMU_INLINE if_integer<T> min(T a, T b) { return a < b ? a : b; }
template <class T> EMU_INLINE if_integer<T> max(T a, T b) { return a > b ? a : b; }
template <class T> EMU_INLINE if_integer<T> abs(T a) { return static_cast<T>(a < 0 ? -a : a); }
template <class T> EMU_INLINE if_integer<T> neg(T a) { return static_cast<T>(-a); }
template <class T> EMU_INLINE T sad(T a, T b, T c) { return static_cast<T>(c + (a < b ? b - a : a - b)); }

template <class T> EMU_INLINE T saturate_integer(wider<T> value) {
    constexpr wider<T> least = std::is_signed_v<T> ? static_cast<wider<T>>(T(1) << (8 * sizeof(T) - 1)) : 0;
    constexpr wider<T> most = static_cast<wider<T>>(static_cast<std::make_unsigned_t<T>>(~least));
    return static_cast<T>(value < least ? least : value > most ? most : value);
}
template <class T> EMU_INLINE T add_sat(T a, T b) { return saturate_integer<T>(static_cast<wider<T>>(a) + b); }
template <class T> EMU_INLINE T sub_sat(T a, T b) { return saturate_integer<T>(static_cast<wider<T>>(a) - b); }

EMU_INLINE bool and_(bool a, bool b) { return a && b; }
EMU_INLINE bool or_(bool a, bool b) { return a || b; }
EMU_INLINE bool xor_(bool a, bool b) { return a != b; }
EMU_INLINE bool not_(bool a) { return !a; }
template <class T> EMU_INLINE if_integer<T> and_(T a, T b) { return static_cast<T>(a & b); }
template <class T> EMU_INLINE if_integer<T> or_(T a, T b) { return static_cast<T>(a | b); }
template <class T> EMU_INLINE if_integer<T> xor_(T a, T b) { return static_cast<T>(a ^ b); }
template <class T> EMU_INLINE if_integer<T> not_(T a) { return static_cast<T>(~a); }

// Amounts beyond the width are clamped to it.
template <class T> EMU_INLINE T shl(T a, u32 amount) {
    return amount >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << amount);
}
template <class T> EMU_INLINE T shr(T a, u32 amount) {
    if (amount >= 8 * sizeof(T)) return static_cast<T>(a < 0 ? -1 : 0);
    return static_cast<T>(a >> amount);
}
EMU_INLINE u32 clamp_shift(u32 amount) { return amount > 32 ? 32 : amount; }
EMU_INLINE u32 shf_l(u32 a, u32 b, u32 amount) {
    return static_cast<u32>(((static_cast<u64>(b) << 32 | a) << amount) >> 32);
}
EMU_INLINE u32 shf_r(u32 a, u32 b, u32 amount) { return static_cast<u32>((static_cast<u64>(b) << 32 | a) >> amount); }
EMU_INLINE u32 shf_l_clamp(u32 a, u32 b, u32 amount) { return shf_l(a, b, clamp_shift(amount)); }
EMU_INLINE u32 shf_r_clamp(u32 a, u32 b, u32 amount) { return shf_r(a, b, clamp_shift(amount)); }
EMU_INLINE u32 shf_l_wrap(u32 a, u32 b, u32 amount) { return shf_l(a, b, amount & 31); }
EMU_INLINE u32 shf_r_wrap(u32 a, u32 b, u32 amount) { return shf_r(a, b, amount & 31); }

template <u32 Table> EMU_INLINE u32 lop3(u32 a, u32 b, u32 c) {
    u32 result = 0;
    if constexpr (Table & 0x01) result |= ~a & ~b & ~c;
    if constexpr (Table & 0x02) result |= ~a & ~b & c;
    if constexpr (Table & 0x04) result |= ~a & b & ~c;
    if constexpr (Table & 0x08) result |= ~a & b & c;
    if constexpr (Table & 0x10) result |= a & ~b & ~c;
    if constexpr (Table & 0x20) result |= a & ~b & c;
    if constexpr (Table & 0x40) result |= a & b & ~c;
    if constexpr (Table & 0x80) result |= a & b & c;
    return result;
}

EMU_INLINE u32 prmt_byte(u64 bytes, u32 selector) {
    const u32 byte = static_cast<u32>(bytes >> (8 * (selector & 7))) & 0xff;
    return selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
}
EMU_INLINE u32 prmt(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    return prmt_byte(bytes, selector) | prmt_byte(bytes, selector >> 4) << 8 | prmt_byte(bytes, selector >> 8) << 16 |
           prmt_byte(bytes, selector >> 12) << 24;
}
// The modes of prmt select bytes by the two low bits of c alone; the selectors stand in PTX ISA's table of prmt.
EMU_INLINE u32 prmt_mode(u32 a, u32 b, u32 c, const u16 (&selectors)[4]) { return prmt(a, b, selectors[c & 3]); }
EMU_INLINE u32 prmt_f4e(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x3210, 0x4321, 0x5432, 0x6543}); }
EMU_INLINE u32 prmt_b4e(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x5670, 0x6701, 0x7012, 0x0123}); }
EMU_INLINE u32 prmt_rc8(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x0000, 0x1111, 0x2222, 0x3333}); }
EMU_INLINE u32 prmt_ecl(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x3210, 0x3211, 0x3222, 0x3333}); }
EMU_INLINE u32 prmt_ecr(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x0000, 0x1110, 0x2210, 0x3210}); }
EMU_INLINE u32 prmt_rc16(u32 a, u32 b, u32 c) { return prmt_mode(a, b, c, {0x1010, 0x3232, 0x1010, 0x3232}); }

template <class T> EMU_INLINE T bfe(T a, u32 position, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    position &= 0xff;
    length &= 0xff;
    using U = std::make_unsigned_t<T>;
    const u32 last = position + length - 1 < width - 1 ? position + length - 1 : width - 1;
    const bool sign = std::is_signed_v<T> && length != 0 && (static_cast<U>(a) >> last & 1);
    U result = sign ? ~U(0) : U(0);
    const U kept = length >= width ? ~U(0) : (U(1) << length) - 1;
    const U field = position >= width ? U(0) : static_cast<U>(a) >> position;
    const U inside = position >= width ? U(0) : (~U(0) >> position) & kept;
    return static_cast<T>((result & ~inside) | (field & inside));
}
template <class T> EMU_INLINE T bfi(T a, T b, u32 position, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    position &= 0xff;
    length &= 0xff;
    if (position >= width) return b;
    const T mask = (length >= width ? ~T(0) : static_cast<T>((T(1) << length) - 1)) << position;
    return (b & ~mask) | ((a << position) & mask);
}
EMU_INLINE u32 clz(u32 a) { return a ? __builtin_clz(a) : 32; }
EMU_INLINE u32 clz(u64 a) { return a ? __builtin_clzll(a) : 64; }
EMU_INLINE u32 popc(u32 a) { return __builtin_popcount(a); }
EMU_INLINE u32 popc(u64 a) { return __builtin_popcountll(a); }
template <class T> EMU_INLINE u32 bfind(T a) {
    using U = std::conditional_t<sizeof(T) == 4, u32, u64>;
    const U value = static_cast<U>(a < 0 ? ~a : a);
    return value ? 8 * sizeof(T) - 1 - clz(value) : ~0u;
}
template <class T> EMU_INLINE u32 bfind_shiftamt(T a) {
    const u32 found = bfind(a);
    return found == ~0u ? found : 8 * sizeof(T) - 1 - found;
}
template <class T> EMU_INLINE T brev(T a) {
    T result = 0;
    for (u32 i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}
// Four (dp4a) or two (dp2a) products of packed bytes, added to c.
template <class A, class B> EMU_INLINE u32 dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32; i += 8) c += static_cast<u32>(static_cast<A>(a >> i) * static_cast<B>(b >> i));
    return c;
}

}  // namespace emu
