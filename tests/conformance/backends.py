"""What the conformance tests need to know of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conformance.bounds import UNIT_ROUNDOFF_F32, UNIT_ROUNDOFF_F64, gamma
from exllama_ops import backends


@dataclass(frozen=True)
class BackendUnderTest:
    """Where the five functions of a backend are found, on which device, and what error its sums declare."""

    name: str
    ops: Any
    device: str

    def relative_error(self, depth: int) -> float:
        """Of a sum of ``depth`` products, before the final rounding."""
        names = {choice.backend.name for choice in backends.report() if choice.dispatch_key.lower() == self.device}
        assert names == {"reference"}, f"no declared bound for {names}"
        # The sum is taken in float64 and rounded to float32.
        return UNIT_ROUNDOFF_F32 + gamma(depth, UNIT_ROUNDOFF_F64)
