"""Floating-point arithmetic by its definition, on bit patterns: the exact rational result, rounded once.

Slow and obvious; what the emulated instructions are compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary IEEE 754 format, or bfloat16."""

    exponent_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.fraction_bits

    @property
    def nan(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def is_nan(self, bits: int) -> bool:
        return bits & self.nan > self.infinity

    def is_finite(self, bits: int) -> bool:
        return bits & self.nan < self.infinity

    def sign(self, bits: int) -> int:
        return bits >> (self.bits - 1) & 1

    def value(self, bits: int) -> Fraction:
        """The value of a finite pattern."""
        exponent = bits >> self.fraction_bits & ((1 << self.exponent_bits) - 1)
        fraction = bits & ((1 << self.fraction_bits) - 1)
        significand = fraction + (bool(exponent) << self.fraction_bits)
        scale = max(exponent, 1) - self.bias - self.fraction_bits
        return (-1) ** self.sign(bits) * significand * Fraction(2) ** scale

    def as_float(self, bits: int) -> float:
        """The value as Python's float, for infinities and NaN; finite ones of up to 64 bits are exact too."""
        if self.is_nan(bits):
            return math.nan
        if not self.is_finite(bits):
            return -math.inf if self.sign(bits) else math.inf
        return math.copysign(float(self.value(bits)), -1 if self.sign(bits) else 1)

    def round(self, value: Fraction, mode: str = "rn", zero_sign: int = 0) -> int:
        """The pattern nearest to `value` ("rn", ties to even), or the next in a direction ("rz", "rm", "rp")."""
        if value == 0:
            return zero_sign << (self.bits - 1)
        sign = int(value < 0)
        magnitude = abs(value)
        exponent = max(_floor_log2(magnitude), 1 - self.bias)
        ulps = magnitude / Fraction(2) ** (exponent - self.fraction_bits)
        down = math.floor(ulps)
        rest = ulps - down
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1),
            "rz": False,
            "rm": rest > 0 and sign == 1,
            "rp": rest > 0 and sign == 0,
        }[mode]
        # Counting in ulps from the bottom of the binade carries into the exponent by itself.
        pattern = down + up + ((exponent + self.bias - 1) << self.fraction_bits)
        if pattern >= self.infinity:
            pattern = self.infinity - (mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and bool(sign)))
        return sign << (self.bits - 1) | pattern

    def of_float(self, value: float) -> int:
        """A special value, or a zero with its sign."""
        if math.isnan(value):
            return self.nan
        sign = int(math.copysign(1, value) < 0) << (self.bits - 1)
        return sign | (self.infinity if math.isinf(value) else 0)

    def flush(self, bits: int) -> int:
        """Subnormals to zero of their sign."""
        return bits if bits & self.infinity else bits & ~self.nan


F16, BF16, F32, F64 = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52)


def _floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def _special(format: Format, result: float | None, value: Fraction | None, mode: str) -> int:
    if value is not None and value != 0:
        return format.round(value, mode)
    assert result is not None
    return format.of_float(result)


def fma(format: Format, a: int, b: int, c: int, mode: str = "rn") -> int:
    """a * b + c"""
    x, y, z = (format.as_float(bits) for bits in (a, b, c))
    if not all(map(format.is_finite, (a, b, c))):
        if math.isinf(x) or math.isinf(y):
            product = (
                math.nan if x == 0 or y == 0 else math.copysign(math.inf, math.copysign(1, x) * math.copysign(1, y))
            )
            product = math.nan if math.isnan(x) or math.isnan(y) else product
        else:
            product = x * y if math.isnan(x) or math.isnan(y) else 0.0  # finite beside an infinite c
        return format.of_float(product + z)
    value = format.value(a) * format.value(b) + format.value(c)
    product_sign = math.copysign(1, x) * math.copysign(1, y)
    zero = math.copysign(0.0, product_sign) + z if (x == 0 or y == 0) and z == 0 else 0.0
    return _special(format, zero, value, mode)


def add(format: Format, a: int, b: int, mode: str = "rn") -> int:
    """a + b"""
    x, y = format.as_float(a), format.as_float(b)
    if not (format.is_finite(a) and format.is_finite(b)):
        return format.of_float(x + y)
    return _special(format, x + y if x == 0 and y == 0 else 0.0, format.value(a) + format.value(b), mode)


def negative(format: Format, a: int) -> int:
    return a ^ 1 << (format.bits - 1)


def mul(format: Format, a: int, b: int, mode: str = "rn") -> int:
    """a * b"""
    x, y = format.as_float(a), format.as_float(b)
    if not (format.is_finite(a) and format.is_finite(b)):
        return format.of_float(x * y)
    zero = math.copysign(0.0, math.copysign(1, x) * math.copysign(1, y))
    return _special(format, zero, format.value(a) * format.value(b), mode)


def div(format: Format, a: int, b: int) -> int:
    """a / b"""
    x, y = format.as_float(a), format.as_float(b)
    sign = math.copysign(1, x) * math.copysign(1, y)
    if math.isnan(x) or math.isnan(y) or (x == 0 and y == 0) or (math.isinf(x) and math.isinf(y)):
        return format.nan
    if math.isinf(x) or y == 0:
        return format.of_float(math.copysign(math.inf, sign))
    if math.isinf(y) or x == 0:
        return format.of_float(math.copysign(0.0, sign))
    return format.round(format.value(a) / format.value(b))


def extremum(format: Format, a: int, b: int, *, largest: bool, propagates: bool = False) -> int:
    """min or max: +0 > -0, a number wins over NaN unless NaN `propagates`."""
    if format.is_nan(a) or format.is_nan(b):
        if propagates or (format.is_nan(a) and format.is_nan(b)):
            return format.nan
        return b if format.is_nan(a) else a

    def key(bits: int) -> tuple[float, int]:
        return format.as_float(bits), -format.sign(bits)

    return max(a, b, key=key) if largest else min(a, b, key=key)


def convert(source: Format, target: Format, a: int, mode: str = "rn") -> int:
    """The value of `a` in another format."""
    if not source.is_finite(a) or source.value(a) == 0:
        return target.of_float(source.as_float(a))
    return target.round(source.value(a), mode)


def to_integral(value: Fraction, mode: str) -> int:
    """rni, rzi, rmi or rpi."""
    return {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](value)


def to_integer(source: Format, a: int, mode: str, bits: int, signed: bool) -> int:
    """The pattern of an integer of `bits` bits: clamped, NaN is 0."""
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if source.is_nan(a):
        return 0
    if not source.is_finite(a):
        return (least if source.sign(a) else most) % (1 << bits)
    return min(max(to_integral(source.value(a), mode), least), most) % (1 << bits)
