"""Who computes: for each op and device, the first backend of a fixed order that can, chosen once, at import.

A backend is a module of this folder with a ``BACKEND``. To add one, add its module and its place in `PRIORITY`.
"""

from __future__ import annotations

from exllama_ops.backends import reference
from exllama_ops.backends._types import Backend, Choice
from exllama_ops.ops import _library

__all__ = ["PRIORITY", "Backend", "Choice", "register", "report"]

# The order in which backends are asked, by dispatch key. ROCm uses the key CUDA.
PRIORITY: dict[str, tuple[Backend, ...]] = {
    "CPU": (reference.BACKEND,),
    "CUDA": (reference.BACKEND,),
}

_choices: list[Choice] = []


def register() -> None:
    """Give every op its kernel on every device; called once, when the package is imported.

    Raises:
        RuntimeError: no backend serves an op on a device, or register was called before.
    """
    for key, backends in PRIORITY.items():
        for name in _library.schemas():
            op = name.removeprefix("_")  # a private twin has the kernel of its public op
            choice = _choose(op, key, backends)
            _library.register_kernel(name, key, choice.backend.kernel(op, key))
            if name == op:
                _choices.append(choice)


def _choose(op: str, key: str, backends: tuple[Backend, ...]) -> Choice:
    passed_over: dict[str, tuple[str, ...]] = {}
    for backend in backends:
        reasons = backend.reasons_against(op, key)
        if not reasons:
            return Choice(op, key, backend, passed_over)
        passed_over[backend.name] = tuple(reasons)
    raise RuntimeError(f"no backend serves exllama::{op} on {key}: {passed_over}")


def report() -> list[Choice]:
    """Which backend serves which op on which device, and why the ones before it do not."""
    return list(_choices)
