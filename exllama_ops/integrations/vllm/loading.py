"""What vLLM's loaders are not given, and what becomes of a layer when they run again. Nothing here needs vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from exllama_ops.checkpoint import Checkpoint
from exllama_ops.nn import ExllamaLinear

# Last names of the tensors of quantized layers, in any format that is read.
_KINDS = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
)  # fmt: skip


class _Method(Protocol):
    def read_again(self, layer: Any) -> None:
        """Put what the files hold now into a layer that was read before."""
        ...


class PackedLayers:
    """The quantized layers of one process, which are read from files by name."""

    def __init__(self) -> None:
        # Name of a layer, whole or without what comes first -> its name in the files; None if several end so.
        self._stored: dict[str, str | None] = {}
        # Name in the files -> who reads it, and for which layer of vLLM.
        self._read: dict[str, tuple[_Method, ref[nn.Module]]] = {}

    def add(self, stored: str, name: str) -> None:
        """Take a layer, before vLLM's loaders run.

        Args:
            stored: its name in the files.
            name: its name in vLLM.
        """
        for whole in {stored, name}:
            end = whole
            while end:  # the loader of a part of a model sees names within that part
                self._stored[end] = stored if self._stored.get(end, stored) == stored else None
                end = end.partition(".")[2]

    def was_read(self, stored: Iterable[str], method: _Method, layer: nn.Module) -> None:
        """Note that a layer of vLLM holds the weights of these names in the files."""
        self._read.update(dict.fromkeys(stored, (method, ref(layer))))

    def left(
        self, weights: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint, reopen: Callable[[], Checkpoint]
    ) -> Iterator[tuple[str, Tensor]]:
        """What vLLM's loaders get of the weights that pass: all but those of quantized layers.

        Layers that were read before are read again when one of their tensors passes.

        Args:
            weights: names and tensors.
            checkpoint: as it was opened.
            reopen: opens it again; its files may be others by now.

        Raises:
            ValueError: a layer that was read before gets a tensor that is not in the files, or has changed its form.
        """
        dense = frozenset(checkpoint.dense)
        again: set[int] = set()
        for name, tensor in weights:
            module, _, kind = name.rpartition(".")
            if kind not in _KINDS or module not in self._stored or name in dense:
                yield name, tensor
                continue
            stored = self._stored[module]
            if stored is None and self._read:
                raise ValueError(f"{name}: exllama_ops cannot tell which layer is meant; start vLLM again to load it")
            method, layer = self._held(stored)
            if method is None:
                continue
            if not again:
                checkpoint = reopen()
                dense = frozenset(checkpoint.dense)
            _check_is_in_files(checkpoint, f"{stored}.{kind}", tensor)
            if id(layer) not in again:
                again.add(id(layer))
                method.read_again(layer)

    def _held(self, stored: str | None) -> tuple[_Method | None, nn.Module | None]:
        """Who read a layer of this name in the files, and the layer, if there is one."""
        method, layer = self._read.get(stored or "", (None, None))
        held = None if layer is None else layer()
        return (None, None) if held is None else (method, held)


def hold(layer: Any, products: nn.Module) -> None:
    """Give a layer of vLLM its products.

    Args:
        layer: of vLLM.
        products: holds `ExllamaLinear` layers; ``layer.exllama`` from now on.
    """
    for product in products.modules():
        if isinstance(product, ExllamaLinear):  # others may share its order, and `refill` writes to it
            name = "perm" if product.shuffled else "g_idx"
            setattr(product, name, getattr(product, name).clone())
    layer.exllama = products
    # While vLLM loads again, it takes the tensors out of all modules, and it puts the same ones back.
    layer.exllama_tensors = _tensors(products)


@torch.no_grad()
def refill(layer: Any, products: nn.Module, name: str) -> None:
    """Put the tensors of other products into those that a layer holds, at their addresses, which graphs know.

    Args:
        layer: of vLLM.
        products: as in `hold`.
        name: of the layer in the files.

    Raises:
        ValueError: the products have another form.
    """
    held, new = layer.exllama_tensors, _tensors(products)
    if _form(held) != _form(new):
        raise ValueError(
            f"{name}: exllama_ops puts other weights into a running model only if they have the same bits, groups and "
            "kind of order, and these have others; start vLLM again to load them"
        )
    for key, tensor in held.items():
        tensor.copy_(new[key])


def _tensors(products: nn.Module) -> dict[str, Tensor]:
    return dict(products.named_buffers(remove_duplicate=False))


def _form(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the products of these tensors have in common with all that they may be replaced by."""
    return {
        name: tensor.tolist() if name.rpartition(".")[2] == "layout" else (tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
    }


def _check_is_in_files(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    """Check that a tensor that vLLM was given is the one that is read."""
    stored = checkpoint.read_tensor(name)
    if stored.dtype != tensor.dtype or not torch.equal(stored, tensor.to(stored.device)):
        raise ValueError(
            f"{name}: exllama_ops reads quantized layers from files, and was given a tensor that is not the one in "
            f"{checkpoint.path}; write the weights there, and reload without sending them"
        )
