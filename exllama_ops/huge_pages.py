"""Memory for weights, in huge pages where Linux gives them: a token reads every weight, and TLB misses slow it down.

Linux gives them to memory that is new and that asks for them (`transparent_hugepage=madvise`, as most systems have it).
So they are asked for when a weight is brought into the order of the kernels, which copies it anyway. Weights lie one
after another in few large mappings, so small ones share pages.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor, nn

_VARIABLE = "EXLLAMA_OPS_HUGE_PAGES"
_HUGE_BYTES = 2 << 20
# Of a mapping, of which only what is written takes memory. It stays as long as any tensor in it.
_MAPPING_BYTES = 64 << 20
# Less would not be noticed, and would make a program with a few tiny weights larger by a page.
_LEAST_BYTES = 64 << 10
_CACHE_LINE = 64


def clone_in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor that is read often: in huge pages if it lies on a CPU and is not tiny.

    EXLLAMA_OPS_HUGE_PAGES=0 opts out, and then this is an ordinary copy.
    """
    # Subclasses, such as fake tensors, have no memory or have it their own way.
    plain = type(tensor) in (Tensor, nn.Parameter)
    if plain and tensor.device.type == "cpu" and _wanted(tensor.nbytes, _LEAST_BYTES):
        # A limit on the address space may forbid a mapping that is larger than the copy.
        with contextlib.suppress(OSError):
            return _take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def empty_in_huge_pages(num_bytes: int) -> Tensor:
    """Bytes on the CPU to read a tensor into; if they are many, in huge pages that go back to the system with it.

    A freed block of the C library stays in the process, and small tensors that come later keep it from being used for
    a large one again.
    """
    if _wanted(num_bytes, _HUGE_BYTES):
        with contextlib.suppress(OSError):
            memory = _Mapping.of(num_bytes).take(num_bytes)
            assert memory is not None
            return memory
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")


def _wanted(num_bytes: int, least: int) -> bool:
    # Only Linux has the constant. The variable is asked each time, which costs nothing beside the copy.
    return num_bytes >= least and hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get(_VARIABLE, "1") != "0"


class _Mapping(mmap.mmap):
    """Private memory that begins on a huge page, given out from its beginning to its end."""

    next = 0
    end = 0

    @classmethod
    def of(cls, num_bytes: int) -> _Mapping:
        """A mapping of so many bytes, of which those that nobody writes to take no memory."""
        # The system puts it on any page, so it is longer by a huge one.
        mapping = cls(-1, num_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
        mapping.next = -address % _HUGE_BYTES
        mapping.end = mapping.next + num_bytes
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    def take(self, num_bytes: int) -> Tensor | None:
        """The next bytes, which keep the mapping alive; or None if there are not as many."""
        offset = self.next
        if offset + num_bytes > self.end:
            return None
        self.next += -(-num_bytes // _CACHE_LINE) * _CACHE_LINE
        return torch.frombuffer(self, dtype=torch.uint8, count=num_bytes, offset=offset)


_lock = threading.Lock()
# The mapping that is not full yet. It goes with its last tensor.
_shared: weakref.ref[_Mapping] | None = None


def _take(num_bytes: int) -> Tensor:
    global _shared
    with _lock:
        mapping = None if _shared is None else _shared()
        memory = None if mapping is None else mapping.take(num_bytes)
        if memory is None:
            mapping = _Mapping.of(max(num_bytes, _MAPPING_BYTES))
            memory = mapping.take(num_bytes)
            _shared = weakref.ref(mapping)
    assert memory is not None
    return memory
