"""The functions of csrc/cuda/cuda.h on numpy arrays, without torch: every buffer is known, and a sanitizer sees it all.

As a program, ``python -m cuda.plain library.so arrays.npz results.npz``, it makes every call for one weight: the work
of the tests with sanitizers, which need a process of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emulation.emulator import Emulator

# As the enumerations of csrc number them. kDense is not one launch: its caller multiplies.
ALGORITHMS = {"scalar": 0, "mma": 1, "tiled": 2}
FLOAT16 = 0

Array = np.ndarray[Any, Any]


class _Weight(ctypes.Structure):
    """layout::Weight."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales")),
        ("scales_dtype", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("K", "N", "G", "group_size")),
        ("bits", ctypes.c_int32),
        ("shuffled", ctypes.c_bool),
        ("zeros_v2", ctypes.c_bool),
    ]


class _Config(ctypes.Structure):
    """cuda::Config."""

    _fields_ = [
        ("algorithm", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("split_k", "k_per_split", "chunk")),
    ]


def fresh(*shape: int, dtype: Any) -> Array:
    """Memory in which every float is NaN."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)
    return array


def sparse(*shape: int, dtype: Any) -> Array:
    """Zeros that take memory where they are written, or read, only."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize, flags), dtype).reshape(shape)


class PlainOps:
    """The ops of an emulated device on arrays of float16 and int32.

    Args:
        device: of a library that has plain_calls.cpp.
        weight: qweight, qzeros, scales and rows (empty: none); K, N, G, group_size, bits, shuffled and zeros_v2.
    """

    def __init__(self, device: Emulator, weight: Mapping[str, Any]) -> None:
        self.device = device
        self.arrays = {name: weight[name] for name in ("qweight", "qzeros", "scales", "rows")}
        sizes = {name: int(weight[name]) for name in ("K", "N", "G", "group_size", "bits")}
        flags = {name: bool(weight[name]) for name in ("shuffled", "zeros_v2")}
        pointers = {name: array.ctypes.data if array.size else None for name, array in self.arrays.items()}
        self.K, self.N, self.bits = sizes["K"], sizes["N"], sizes["bits"]
        self.weight = _Weight(**pointers, scales_dtype=FLOAT16, **sizes, **flags)
        # What the calls have written, and what a recording of them may write again.
        self.kept: list[Array] = []

    def _call(self, name: str, *args: Any) -> None:
        function = self.device.library[f"plain_{name}"]
        function.restype = ctypes.c_char_p
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        self.kept += arrays
        ranges = [(a.ctypes.data, a.nbytes) for a in (*self.arrays.values(), *arrays) if a.size]
        with self.device.only(ranges):
            error = function(*(_as_c(arg) for arg in args))
            self.device.check()
        assert error is None, error

    def can(self, algorithm: str, M: int) -> bool:
        return self._config(algorithm, M)[1] >= 0

    def _config(self, algorithm: str, M: int) -> tuple[_Config, int]:
        config = _Config()
        function = self.device.library.plain_config
        function.restype = ctypes.c_int64
        arguments = (ctypes.byref(self.weight), FLOAT16, ctypes.c_int64(M), ALGORITHMS[algorithm], ctypes.byref(config))
        return config, function(*arguments)

    def gemm(self, x: Array, algorithm: str, out: Array | None = None, *, split: bool = True) -> Array:
        """By an algorithm; with all rows of W in one thread block, unless they may be split among several."""
        config, workspace_bytes = self._config(algorithm, len(x))
        if not split:
            config.split_k, config.k_per_split = 1, config.split_k * config.k_per_split
        if out is None:
            out = fresh(len(x), self.N, dtype=np.float16)
        workspace = fresh(workspace_bytes, dtype=np.uint8)
        self._call("gemm", self.weight, x, FLOAT16, len(x), out, config, workspace)
        return out

    def gemm_dx(self, grad: Array, dx: Array | None = None) -> Array:
        if dx is None:
            dx = fresh(len(grad), self.K, dtype=np.float16)
        self._call("gemm_dx", self.weight, grad, FLOAT16, len(grad), dx)
        return dx

    def dequantize(self, first: int = 0, columns: int | None = None) -> Array:
        out = fresh(self.K, self.N if columns is None else columns, dtype=np.float16)
        self._call("dequantize", self.weight, first, out.shape[1], out, FLOAT16)
        return out

    def shuffle(self, words: Array, perm: Array) -> None:
        """In place."""
        count = self.device.library.plain_shuffle_workspace_bytes
        count.restype = ctypes.c_int64
        needed = count(ctypes.c_int64(self.K), ctypes.c_int64(self.N), self.bits, ctypes.c_bool(perm.size > 0))
        self._call("shuffle", words, perm, self.K, self.N, self.bits, fresh(needed, dtype=np.uint8))

    def unshuffle(self, words: Array, perm: Array) -> Array:
        count = self.device.library.plain_unshuffle_workspace_bytes
        count.restype = ctypes.c_int64
        workspace = fresh(count(ctypes.c_int64(self.K), ctypes.c_bool(perm.size > 0)), dtype=np.uint8)
        out = fresh(*words.shape, dtype=np.int32)
        self._call("unshuffle", words, perm, self.K, self.N, self.bits, out, workspace)
        return out


def _as_c(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data if value.size else None)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else ctypes.c_int64(value)


def every_call(ops: PlainOps, x: Array, grad: Array, algorithms: list[str]) -> dict[str, Array]:
    """The results of all ops: products by each of the algorithms, for one row of x and for all."""
    results = {"dequantize": ops.dequantize(), "gemm_dx": ops.gemm_dx(grad)}
    for algorithm in algorithms:
        for M in (1, len(x)):
            results[f"{algorithm} {M}"] = ops.gemm(x[:M], algorithm)
    if ops.weight.shuffled:
        results["unshuffle"] = ops.unshuffle(ops.arrays["qweight"], ops.arrays["rows"])
        results["shuffle"] = results["unshuffle"].copy()
        ops.shuffle(results["shuffle"], ops.arrays["rows"])
    return results


def main(library: str, arrays: str, results: str) -> None:
    given = dict(np.load(arrays))
    ops = PlainOps(Emulator(Path(library)), given)
    np.savez(results, **every_call(ops, given["x"], given["grad"], [str(name) for name in given["algorithms"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
