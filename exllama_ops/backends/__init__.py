"""Who computes: for each op and device, the first backend of a fixed order that can, chosen once, at import.

A backend is a module of this folder with a ``BACKEND``. To add one, add its module and its place in `PRIORITY`.
The environment variable EXLLAMA_OPS_BACKEND names one backend to be asked before the reference, and no other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exllama_ops.backends import cpu, cuda, reference, triton
from exllama_ops.backends._types import VARIABLE, Backend, Choice, Report
from exllama_ops.ops import _library

__all__ = ["PRIORITY", "Backend", "Choice", "Report", "has_kernel", "register", "report", "serving"]

# The order in which backends are asked, by dispatch key. ROCm uses the key CUDA.
PRIORITY: dict[str, tuple[Backend, ...]] = {
    "CPU": (cpu.BACKEND, triton.BACKEND, reference.BACKEND),
    "CUDA": (cuda.BACKEND, triton.BACKEND, reference.BACKEND),
    "XPU": (triton.BACKEND, reference.BACKEND),
}


def _only() -> str | None:
    """The backend that the environment names, if it names one."""
    only = os.environ.get(VARIABLE)
    names = sorted({backend.name for backends in PRIORITY.values() for backend in backends})
    if only and only not in names:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(names)}, or not set; got {only!r}")
    return only or None


_ONLY = _only()


def register() -> None:
    """Give every op its kernel on every device; called once, when the package is imported.

    Raises:
        RuntimeError: no backend serves an op on a device, or register was called before.
    """
    for key, backends in PRIORITY.items():
        for name in _library.schemas():
            _library.register_kernel(name, key, _kernel(_library.op_of(name), key, backends, {}))


def _kernel(
    op: str, key: str, backends: Sequence[Backend], passed_over: Mapping[str, tuple[str, ...]]
) -> _library.NativeKernel | Callable[..., Any]:
    """The kernel of the first backend that can serve; it goes on to those after it if it finds that it cannot."""
    choice = _choose(op, key, backends, passed_over)
    later = backends[backends.index(choice.backend) + 1 :]

    def next_best(reasons: Sequence[str]) -> Callable[..., Any]:
        kernel = _kernel(op, key, later, {**choice.passed_over, choice.backend.name: tuple(reasons)})
        return _library.late_kernel(op, key, kernel) if isinstance(kernel, _library.NativeKernel) else kernel

    return choice.backend.kernel(op, key, choice.passed_over, next_best)


def _choose(
    op: str, key: str, backends: Sequence[Backend], before: Mapping[str, tuple[str, ...]] | None = None
) -> Choice:
    passed_over = dict(before or {})
    for backend in backends:
        reasons = _reasons_against(backend, op, key)
        if not reasons:
            return Choice(op, key, backend, passed_over)
        passed_over[backend.name] = reasons
    raise RuntimeError(f"no backend serves exllama::{op} on {key}: {passed_over}")


def _reasons_against(backend: Backend, op: str, key: str) -> tuple[str, ...]:
    if _ONLY not in (None, backend.name) and backend is not reference.BACKEND:
        return (f"{VARIABLE}={_ONLY}",)
    return tuple(backend.reasons_against(op, key))


def serving(op: str, dispatch_key: str) -> Backend:
    """The backend that serves an op on a device."""
    return _choose(op, dispatch_key, PRIORITY[dispatch_key]).backend


def has_kernel(op: str, device: str) -> bool:
    """Whether kernels serve an op on a type of device, such as "cuda", and not the reference."""
    key = device.upper()
    return key in PRIORITY and serving(op, key) is not reference.BACKEND


def report() -> Report:
    """Say which backend serves which op on which device, and why.

    ``print(exllama_ops.backends.report())`` shows a table; the report itself is a sequence of `Choice`. A backend that
    finds out at its first call whether it can serve shows as it stands now.
    """
    ops = dict.fromkeys(_library.op_of(name) for name in _library.schemas())
    choices = (_choose(op, key, backends) for key, backends in PRIORITY.items() for op in ops)
    return Report(replace(choice, later=_later(choice)) for choice in choices)


def _later(choice: Choice) -> dict[str, tuple[str, ...]]:
    if choice.backend.is_settled():
        return {}
    order = PRIORITY[choice.dispatch_key]
    later = order[order.index(choice.backend) + 1 :]
    return {backend.name: _reasons_against(backend, choice.op, choice.dispatch_key) for backend in later}
