"""One tensor for equal orders of rows: compiled graphs know by it that projections of one input agree in theirs."""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Entries live as long as somebody else holds the tensor.
_orders: WeakValueDictionary[tuple[torch.device, bool, int, int], Tensor] = WeakValueDictionary()
# If two threads load equal orders, the second finds the tensor of the first.
_lock = threading.Lock()


def intern(order: Tensor) -> Tensor:
    """The first tensor that came here with these values, on this device, and is alive; or ``order`` itself.

    Whoever holds the result shares it and must not write to it. Reads the values: a load-time step.

    Args:
        order: (K,) int32, a permutation or a g_idx. Returned as it is if it is empty, on the meta device, or of a
            subclass of Tensor (a fake tensor, a DTensor), whose values may not be read.
    """
    if not _is_plain(order) or not order.numel():
        return order
    K = order.shape[0]
    weights = torch.arange(1, K + 1, dtype=torch.int64, device=order.device)
    # Autograd refuses to save an inference tensor, so a model that trains must not be given one.
    key = (order.device, order.is_inference(), K, int((order * weights).sum()))
    with _lock:
        known = _orders.setdefault(key, order)
    if torch.equal(known, order):
        return known
    with _lock:
        _orders[key] = order
    return order


def intern_copy(copy: Tensor, original: Tensor) -> Tensor:
    """`intern` of what was made from another order of rows, if it has its values; ``to_empty`` makes what has none."""
    if _is_plain(copy) and _is_plain(original) and torch.equal(copy.to(original.device), original):
        return intern(copy)
    return copy


def _is_plain(order: Tensor) -> bool:
    return type(order) is Tensor and not order.is_meta
