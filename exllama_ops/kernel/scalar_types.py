"""The types of a stored value: its width, and the zero point that the type itself may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class WeightType(Protocol):
    """What a config's weight_type needs. vLLM's own ScalarType has it, and so has ours."""

    @property
    def size_bits(self) -> int:
        """Width of a stored value."""
        ...

    @property
    def bias(self) -> int:
        """What is subtracted from a stored value; 0 for none."""
        ...


@dataclass(frozen=True)
class ScalarType:
    """An unsigned integer of ``size_bits`` bits that stands for ``stored - bias``.

    Args:
        size_bits: width of a stored value.
        bias: the zero point of every value; 0 for a type whose zero points come with the weight.
    """

    size_bits: int
    bias: int = 0

    def has_bias(self) -> bool:
        """Whether the type itself says the zero point."""
        return self.bias != 0

    def __str__(self) -> str:
        return f"uint{self.size_bits}" + (f"b{self.bias}" if self.bias else "")


uint2b2 = ScalarType(2, 2)
uint3b4 = ScalarType(3, 4)
uint4b8 = ScalarType(4, 8)
uint8b128 = ScalarType(8, 128)
uint2 = ScalarType(2)
uint3 = ScalarType(3)
uint4 = ScalarType(4)
uint8 = ScalarType(8)

SUPPORTED = (uint2b2, uint3b4, uint4b8, uint8b128, uint2, uint3, uint4, uint8)


def own_type(weight_type: WeightType) -> ScalarType | None:
    """Our type of the same size and bias. None if there is none, or if the other is signed or floating point."""
    if getattr(weight_type, "signed", False) or getattr(weight_type, "exponent", 0):
        return None
    key = (getattr(weight_type, "size_bits", None), getattr(weight_type, "bias", None))
    return next((own for own in SUPPORTED if (own.size_bits, own.bias) == key), None)
