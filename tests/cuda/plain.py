"""The functions of csrc/cuda/cuda.h on numpy arrays, without torch: every buffer is known, and a sanitizer sees it all.

As a program, ``python -m cuda.plain library.so arrays.npz results.npz``, it makes every call for some weights: the work
of the tests with sanitizers, which need a process of their own.

numpy has no bfloat16: arrays of uint16 hold its bits.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptx_emulator.emulator import Emulator

# The numbers of the enumerations in csrc. kDense is not one launch: its caller multiplies.
ALGORITHMS = {"scalar": 0, "mma": 1, "tiled": 2, "pipelined": 4}
PIECES = {"scalar": 256, "mma": 128, "pipelined": 128}  # rows of W that no split divides
DTYPES = (np.dtype(np.float16), np.dtype(np.uint16), np.dtype(np.float32))

ARRAYS = ("qweight", "qzeros", "scales", "row_order")
SIZES = ("K", "N", "G", "group_size", "bits", "zero_offset")
FLAGS = ("shuffled",)

Array = np.ndarray[Any, Any]
NO_OFFSETS: Array = np.empty(0, np.int32)


class _Weight(ctypes.Structure):
    """layout::Weight."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales")),
        ("scales_dtype", ctypes.c_int32),
        ("row_order", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("K", "N", "G", "group_size")),
        ("bits", ctypes.c_int32),
        ("shuffled", ctypes.c_bool),
        ("zero_offset", ctypes.c_int32),
        ("in_features", ctypes.c_int64),
    ]


class _Experts(ctypes.Structure):
    """cuda::Experts."""

    _fields_ = [("offsets", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Config(ctypes.Structure):
    """cuda::Config."""

    _fields_ = [
        ("algorithm", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "split_k", "k_per_split", "chunk")),
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
    """The ops of an emulated device on arrays.

    Args:
        device: of a library that has plain_calls.cpp.
        parts: of a product; a weight is one. Each has qweight, qzeros, scales and row_order (empty: none); K, N, G,
            group_size, bits, shuffled and zero_offset.
        allocate: the memory of results.
        offsets: of the experts in the stacks that the one part has; empty: it is a weight.
    """

    def __init__(
        self,
        device: Emulator,
        parts: Sequence[Mapping[str, Any]],
        allocate: Callable[..., Array] = fresh,
        offsets: Array = NO_OFFSETS,
    ) -> None:
        self.device = device
        self.allocate = allocate
        self.parts = parts
        self.weights = (_Weight * len(parts))(*map(_as_weight, parts))
        self.offsets = offsets
        self.experts = _Experts(offsets.ctypes.data, len(offsets) - 1) if offsets.size else _Experts()
        # What the calls have written, and what a recording of them may write again.
        self.kept: list[Array] = []

    def _call(self, name: str, *args: Any) -> None:
        function = self.device.library[f"plain_{name}"]
        function.restype = ctypes.c_char_p
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        self.kept += arrays
        of_parts = [part[array] for part in self.parts for array in ARRAYS]
        ranges = [(a.ctypes.data, a.nbytes) for a in (*of_parts, self.offsets, *arrays) if a.size]
        with self.device.only(ranges):
            error = function(*(_as_c(arg) for arg in args))
            self.device.check()
        assert error is None, error

    def can(self, algorithm: str, x: Array) -> bool:
        """Whether it can multiply x and all parts."""
        return self._config(algorithm, x, len(self.parts))[1] >= 0

    def _config(self, algorithm: str, x: Array, count: int) -> tuple[_Config, int]:
        config = _Config()
        function = self.device.library.plain_config
        function.restype = ctypes.c_int64
        sizes = (ctypes.c_int64(count), ctypes.byref(self.experts), DTYPES.index(x.dtype), ctypes.c_int64(len(x)))
        return config, function(self.weights, *sizes, ALGORITHMS[algorithm], ctypes.byref(config))

    def _workspace_bytes(self, config: _Config, x: Array, count: int) -> int:
        function = self.device.library.plain_workspace_bytes
        function.restype = ctypes.c_int64
        sizes = (ctypes.c_int64(count), ctypes.byref(self.experts), DTYPES.index(x.dtype), ctypes.c_int64(len(x)))
        found: int = function(self.weights, *sizes, ctypes.byref(config))
        return found

    def gemm(
        self,
        x: Array,
        algorithm: str,
        out: Array | None = None,
        *,
        count: int = 1,
        splits: int | None = None,
        rows: int | None = None,
        workspace: Array | None = None,
    ) -> Array:
        """The product by an algorithm, with the first `count` parts.

        Args:
            splits: up to so many thread blocks share the rows of W; by default as many as select_gemm says.
            rows: of x that a thread block multiplies, of those that the algorithm knows; likewise.
            workspace: for the splits.
        """
        config, workspace_bytes = self._config(algorithm, x, count)
        columns = sum(weight.N for weight in self.weights[:count])
        if splits is not None and algorithm in PIECES:
            pieces = -(-self.weights[0].K // PIECES[algorithm])
            config.k_per_split = -(-pieces // splits) * PIECES[algorithm]
            config.split_k = -(-self.weights[0].K // config.k_per_split)
            workspace_bytes = self._workspace_bytes(config, x, count)
        if rows is not None:
            config.rows = rows
        if workspace is None:
            workspace = fresh(workspace_bytes, dtype=np.uint8)
        if out is None:
            out = self.allocate(len(x), columns, dtype=x.dtype)
        product = (self.weights, count, self.experts, x, DTYPES.index(x.dtype), len(x), out)
        self._call("gemm", *product, config, workspace)
        return out

    def gemm_dx(self, grad: Array, dx: Array | None = None) -> Array:
        if dx is None:
            dx = self.allocate(len(grad), self.weights[0].K, dtype=grad.dtype)
        self._call("gemm_dx", self.weights, self.experts, grad, DTYPES.index(grad.dtype), len(grad), dx)
        return dx

    def dequantize(self, first: int = 0, columns: int | None = None, out: Array | None = None) -> Array:
        """The first part, in the dtype of its scales."""
        weight = self.weights[0]
        if out is None:
            dtype = self.parts[0]["scales"].dtype
            out = self.allocate(weight.K, weight.N if columns is None else columns, dtype=dtype)
        self._call("dequantize", self.weights, first, out.shape[1], out, DTYPES.index(out.dtype))
        return out

    def shuffle(self, words: Array, perm: Array) -> None:
        """Words of the first part's shape, in place."""
        weight = self.weights[0]
        count = self.device.library.plain_shuffle_workspace_bytes
        count.restype = ctypes.c_int64
        needed = count(ctypes.c_int64(weight.K), ctypes.c_int64(weight.N), weight.bits, ctypes.c_bool(perm.size > 0))
        workspace = fresh(needed, dtype=np.uint8)
        self._call("shuffle", words, perm, weight.K, weight.N, weight.bits, workspace)

    def unshuffle(self, words: Array, perm: Array, out: Array | None = None) -> Array:
        weight = self.weights[0]
        count = self.device.library.plain_unshuffle_workspace_bytes
        count.restype = ctypes.c_int64
        workspace = fresh(count(ctypes.c_int64(weight.K), ctypes.c_bool(perm.size > 0)), dtype=np.uint8)
        if out is None:
            out = self.allocate(*words.shape, dtype=np.int32)
        self._call("unshuffle", words, perm, weight.K, weight.N, weight.bits, out, workspace)
        return out


def _as_weight(part: Mapping[str, Any]) -> _Weight:
    pointers = {name: part[name].ctypes.data if part[name].size else None for name in ARRAYS}
    sizes = {name: int(part[name]) for name in SIZES}
    flags = {name: bool(part[name]) for name in FLAGS}
    scales_dtype = DTYPES.index(part["scales"].dtype)
    return _Weight(**pointers, scales_dtype=scales_dtype, **sizes, **flags, in_features=sizes["K"])


def _as_c(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data if value.size else None)
    is_memory = isinstance(value, ctypes.Structure | ctypes.Array)
    return ctypes.byref(value) if is_memory else ctypes.c_int64(value)


def every_call(ops: PlainOps, inputs: Mapping[str, Array], products: Sequence[tuple[str, str]]) -> dict[str, Array]:
    """The results of all ops; products for one row of x and for all, of one part and of all. K is split for all rows.

    Of experts there are products and gradients.

    Args:
        ops: of the weights.
        inputs: "x" and "grad" of each dtype, such as "x float16".
        products: algorithms and dtypes.
    """
    of_experts = ops.offsets.size > 0
    results = {} if of_experts else {"dequantize": ops.dequantize()}
    for name, array in inputs.items():
        if name.startswith("grad "):
            results[name] = ops.gemm_dx(array)
    for (algorithm, dtype), count in itertools.product(products, sorted({1, len(ops.parts)})):
        x = inputs[f"x {dtype}"]
        for M in (len(x),) if of_experts else (1, len(x)):
            splits = 2 if M > 1 else None
            results[f"{algorithm} {dtype} {M} {count}"] = ops.gemm(x[:M], algorithm, count=count, splits=splits)
    if ops.weights[0].shuffled and not of_experts:
        results["unshuffle"] = ops.unshuffle(ops.parts[0]["qweight"], ops.parts[0]["row_order"])
        results["shuffle"] = results["unshuffle"].copy()
        ops.shuffle(results["shuffle"], ops.parts[0]["row_order"])
    return results


def save(
    path: Path,
    parts: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Array],
    products: Sequence[tuple[str, str]],
    offsets: Array = NO_OFFSETS,
) -> None:
    """The arrays of a run of this file as a program."""
    of_parts = {f"{i} {name}": value for i, part in enumerate(parts) for name, value in part.items()}
    np.savez(path, **of_parts, **inputs, products=np.array(products), offsets=offsets)


def main(library: str, arrays: str, results: str) -> None:
    given = dict(np.load(arrays))
    products = [(str(algorithm), str(dtype)) for algorithm, dtype in given.pop("products")]
    offsets = given.pop("offsets")
    parts: dict[str, dict[str, Array]] = {}
    for key in [key for key in given if key[0].isdigit()]:
        index, name = key.split()
        parts.setdefault(index, {})[name] = given.pop(key)
    ops = PlainOps(Emulator(Path(library)), list(parts.values()), offsets=offsets)
    np.savez(results, **every_call(ops, given, products))


if __name__ == "__main__":
    main(*sys.argv[1:])
