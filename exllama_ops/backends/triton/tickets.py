"""The tickets by which the programs of a launch find the last one of a tile: `splits.py` has what they do with them.

No two launches that run at a time may share tickets. Those of this module lie on a device from the first use on. They
are zero, and each launch leaves them zero, so no launch has to clean any. A set of them belongs to whoever runs one
launch at a time: to a stream, or to a stream in a captured graph. Neither gives its set back.

A launch that gets no set has tickets of its own, which are filled with zeros on the stream before it. That is a launch
too, but of no other kernel: what was compiled before a capture still serves.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# A launch with more tiles than a set has tickets fills a device anyway.
SETS, TICKETS = 1024, 512
# Streams have a part of the sets, so that streams which come and go leave some to graphs.
SETS_OF_STREAMS = SETS // 4


class User(NamedTuple):
    """A stream, by its id, and the id of the capture that it is in, 0 for none. Neither id is ever another's."""

    capture: int
    stream: int


class Sets:
    """The sets of one device, which are zero when the constructor returns, for every stream."""

    def __init__(self, device: torch.device) -> None:
        zeros = torch.zeros(SETS, TICKETS, dtype=torch.int32, device="cpu")
        # What this thread allocates may go to the pool of a graph that is warmed up. Another thread's memory does not.
        with ThreadPoolExecutor(1) as other_thread:
            self._tickets: Tensor = other_thread.submit(zeros.to, device).result()
        self._of_user: dict[User, Tensor] = {}
        self._free_of_streams = list(range(SETS_OF_STREAMS))
        self._free_of_graphs = list(range(SETS_OF_STREAMS, SETS))

    def of_user(self, user: User) -> Tensor | None:
        """The user's tickets; None if there is no set left."""
        if user not in self._of_user:
            free = self._free_of_graphs if user.capture else self._free_of_streams
            if not free:
                return None
            self._of_user[user] = self._tickets[free.pop()]
        return self._of_user[user]


_sets: dict[torch.device, Sets] = {}
_lock = threading.Lock()


def tickets_for(device: torch.device, tiles: int) -> Tensor | None:
    """A ticket for each tile of a launch on the current stream, all 0; None where a kernel is to add up the partials.

    That is on AMD's devices, whose barriers need not wait for what other waves have stored, and on unknown ones.
    """
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return None
    tickets = None
    if tiles <= TICKETS and (user := user_of(device)) is not None:
        with _lock:
            # In a capture nothing can be allocated but for the graph.
            if device not in _sets and not user.capture:
                _sets[device] = Sets(device)
            if device in _sets:
                tickets = _sets[device].of_user(user)
    return torch.zeros(tiles, dtype=torch.int32, device=device) if tickets is None else tickets


def user_of(device: torch.device) -> User | None:
    """The user of a device's current stream; None on a CPU, and where the driver does not tell."""
    driver = None if device.type == "cpu" else driver_of("libcuda.so.1")
    if driver is None:
        return None
    with torch.accelerator.device_index(device.index):
        return user_of_stream(driver, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def driver_of(name: str) -> ctypes.CDLL | None:
    """The driver in a file, if it knows the ids of streams and captures."""
    try:
        driver = ctypes.CDLL(name)
        for function in ("cuStreamGetId", "cuStreamGetCaptureInfo_v2"):
            getattr(driver, function).restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return driver


def user_of_stream(driver: ctypes.CDLL, stream: int) -> User | None:
    """The user of a stream of the current device, by its handle; None if the driver does not tell."""
    handle, status, capture, number = ctypes.c_void_p(stream), ctypes.c_int(), ctypes.c_uint64(), ctypes.c_uint64()
    failed = driver.cuStreamGetCaptureInfo_v2(
        handle, ctypes.byref(status), ctypes.byref(capture), None, None, None
    ) or driver.cuStreamGetId(handle, ctypes.byref(number))
    return None if failed else User(capture.value if status.value else 0, number.value)
