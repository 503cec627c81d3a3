"""Our ops in plain aten ops, for targets that do not have ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exllama_ops import reference
from exllama_ops.ops import _library


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """A decomposition table for `torch.export.ExportedProgram.run_decompositions`: each op -> its reference.

    The reference is functional, and its sums are float64. `gptq_shuffle`, which writes into its argument, is left: a
    weight is shuffled when it is loaded, not in a forward.

    Returns:
        For every overload of the ops; add it to `torch.export.default_decompositions()` to decompose the
        rest to the core ops as well.
    """
    overloads = {name: _library.overload(name) for name in _library.schemas()}
    return {
        overload: getattr(reference, _library.op_of(name))
        for name, overload in overloads.items()
        if not overload._schema.is_mutable
    }
