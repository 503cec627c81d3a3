"""The one owner of the ``exllama`` operator namespace: schemas, fakes and kernels are registered here and only here.

Schemas and tags belong to Python (``Library.define`` and ``impl`` cost a third of the ``custom_op`` decorator per
call). Native libraries bring implementations only, since a second definition of a schema kills the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from exllama_ops.ops import _refuse

NAMESPACE = "exllama"

# The rules for contiguity are checked while tracing, so Inductor must pass the strides that were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Where native kernels live that come when an op has its one kernel already.
LATE_NAMESPACE = "exllama_late"


@dataclass(frozen=True)
class NativeKernel:
    """A kernel in a native library, which hands it to torch itself.

    Args:
        install: takes a namespace and the name of an op in it.
    """

    install: Callable[[str, str], None]


_library = torch.library.Library(NAMESPACE, "DEF")
_late_library: torch.library.Library | None = None
_late_names: set[str] = set()
_late_lock = threading.Lock()
_schemas: dict[str, str] = {}
_kernels: dict[tuple[str, str], Callable[..., Any] | NativeKernel] = {}


def define_op(name: str, arguments: str, returns: str, *, fake: Callable[..., Any]) -> None:
    """Define ``exllama::name`` with its fake, which also serves meta tensors.

    Args:
        name: of the op, or of a second overload, "op.overload". Calls of ``torch.ops.exllama.op`` never take that one.
        arguments: of the schema.
        returns: of the schema.
        fake: with the arguments of the op.
    """
    _schemas[name] = f"{name}({arguments}) -> {returns}"
    if name == op_of(name):
        _library.define(_schemas[name], tags=_TAGS)
    else:
        # Library.define would also tell the op of it, which then tries both overloads when arguments have wrong types,
        # and lists both in its error.
        getattr(torch.ops.exllama, op_of(name))
        assert _library.m is not None
        _library.m.define(_schemas[name], "", _TAGS)
    op = overload(name)
    refuse_other_layouts = _refuse.other_layouts(op)

    def checked_fake(*args: Any) -> Any:
        _refuse.onnx_export(op)
        refuse_other_layouts(*args)
        return fake(*args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_library)
    for dispatch_key in _refuse.NOT_DENSE:
        register_kernel(name, dispatch_key, refuse_other_layouts)


def op_of(name: str) -> str:
    """The name of the op whose overload a name is: "gptq_gemm" of "gptq_gemm.no_autograd"."""
    return name.partition(".")[0]


def overload(name: str) -> torch._ops.OpOverload:
    """The overload of a name, which is the default one if it names none."""
    op, _, name = name.partition(".")
    result: torch._ops.OpOverload = getattr(getattr(torch.ops.exllama, op), name or "default")
    return result


def register_kernel(
    name: str, dispatch_key: str, kernel: Callable[..., Any] | NativeKernel, *, with_keyset: bool = False
) -> None:
    """Register the one kernel of an op for a dispatch key; a second one is a bug in the choice of backends."""
    if (name, dispatch_key) in _kernels:
        raise RuntimeError(f"{NAMESPACE}::{name} already has a kernel for {dispatch_key}")
    _kernels[name, dispatch_key] = kernel
    if isinstance(kernel, NativeKernel):
        kernel.install(NAMESPACE, name)
    else:
        _library.impl(name, kernel, dispatch_key, with_keyset=with_keyset)


def late_kernel(name: str, dispatch_key: str, kernel: NativeKernel) -> Callable[..., Any]:
    """A function that calls a native kernel which came after ``exllama::name`` had got its own.

    That one may be running in another thread and is never exchanged. The native one goes to an op of the same schema
    in a second namespace, which nobody but the returned function calls. It enters the dispatcher at the kernel's key,
    below autograd.
    """
    global _late_library
    with _late_lock:
        if _late_library is None:
            _late_library = torch.library.Library(LATE_NAMESPACE, "DEF")
        if name not in _late_names:  # for another dispatch key it may have come before
            _late_library.define(_schemas[name])
            _late_names.add(name)
        kernel.install(LATE_NAMESPACE, name)
    redispatch = getattr(getattr(torch.ops, LATE_NAMESPACE), name).default.redispatch
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def call(*args: Any, **kwargs: Any) -> Any:
        return redispatch(keys, *args, **kwargs)

    return call


def register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """Register a rule of `exllama_ops.ops._vmap` for an op."""
    op = overload(name)

    def batch(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
        return rule(op, info.batch_size, dims, *args)

    torch.library.register_vmap(f"{NAMESPACE}::{name}", batch, lib=_library)


def no_gradient(name: str) -> None:
    """Declare that an op has no gradient: its results never require one, whatever its arguments do."""
    register_kernel(name, "Autograd", torch.library.fallthrough_kernel)


def schemas() -> dict[str, str]:
    """Every overload defined in the namespace: name -> schema. A default overload has the name of its op."""
    return dict(_schemas)


def kernel(name: str, dispatch_key: str) -> Callable[..., Any] | NativeKernel | None:
    """The kernel registered for an op and a dispatch key, or None."""
    return _kernels.get((name, dispatch_key))
