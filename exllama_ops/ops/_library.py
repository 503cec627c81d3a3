"""The one owner of the ``exllama`` operator namespace: schemas, fakes and kernels are registered here and only here.

Schemas and tags belong to Python (``Library.define`` and ``impl`` cost a third of the ``custom_op`` decorator per
call); native libraries bring implementations only, since a second definition of a schema kills the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "exllama"

# Inductor must pass the strides that were traced: the rules for contiguity are checked there, and the looser
# needs_contiguous_strides would copy a weight that is a view on every call.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library(NAMESPACE, "DEF")
_schemas: dict[str, str] = {}
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def define_op(name: str, arguments: str, returns: str, *, fake: Callable[..., Any]) -> None:
    """Define ``exllama::name`` with its fake, which also serves meta tensors."""
    _schemas[name] = f"{name}({arguments}) -> {returns}"
    _library.define(_schemas[name], tags=_TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def register_kernel(name: str, dispatch_key: str, kernel: Callable[..., Any], *, with_keyset: bool = False) -> None:
    """Register the one kernel of an op for a dispatch key; a second one is a bug in the choice of backends."""
    if (name, dispatch_key) in _kernels:
        raise RuntimeError(f"{NAMESPACE}::{name} already has a kernel for {dispatch_key}")
    _kernels[name, dispatch_key] = kernel
    _library.impl(name, kernel, dispatch_key, with_keyset=with_keyset)


def no_gradient(name: str) -> None:
    """Declare that an op has no gradient: its results never require one, whatever its arguments do."""
    register_kernel(name, "Autograd", torch.library.fallthrough_kernel)


def schemas() -> dict[str, str]:
    """Every op defined in the namespace, private twins included: name -> schema."""
    return dict(_schemas)


def kernel(name: str, dispatch_key: str) -> Callable[..., Any] | None:
    """The kernel registered for an op and a dispatch key, or None."""
    return _kernels.get((name, dispatch_key))
