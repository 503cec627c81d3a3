"""Kernels of the Triton backend compiled for GPUs that are not there, as a launch on them would compile them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from exllama_ops.backends.triton import dequantize, gemm, gemm_dx, shuffle, tiles
from exllama_ops.layout.formats import FORMATS

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """A kernel with what is compiled into it, and the weights that a thread takes in a round of its loop.

    ``parts`` is how many weights share a launch of gptq_gemm_multi.
    """

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    weights: float
    parts: int = 1

    @property
    def uses_matrix_units(self) -> bool:
        return self.name.startswith("dot-")


def variants(arch: str, bits: int) -> Iterator[Variant]:
    """Every kernel for a class of devices and a width, in every tile of the table."""
    values = FORMATS[bits].block_values
    weight = {"BITS": bits, "SHUFFLED": True, "ZERO_OFFSET": 0}

    def variant(
        name: str, kernel: Any, dtype: torch.dtype, rows: int, tile: tiles.Tile, parts: int = 1, **constants: Any
    ) -> Variant:
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_B": rows // values, "BLOCK_N": tile.block_n}
        weights = rows * tile.block_n / (32 * tile.num_warps)
        constants = {**weight, **constants, **sizes}
        return Variant(name, kernel, dtype, constants, tile.num_warps, tile.num_stages, weights, parts)

    gemv_rows = tiles.gemv_blocks(bits) * values
    for M in (1, tiles.GEMV_ROWS):
        for groups, has_rows in (("tile", False), ("block", True), ("row", False)):
            tile = tiles.tile_of("gemv", arch, bits, M, groups)
            name = f"gemv-{M}-{groups}{'-perm' if has_rows else ''}"
            constants = {"GROUPS_OF": groups, "HAS_ROWS": has_rows}
            yield variant(name, gemm.gemv_kernel, torch.float16, gemv_rows, tile, **constants)
    tile = tiles.tile_of("gemv", arch, bits, 1, "tile")
    constants = {"GROUPS_OF": "tile", "HAS_ROWS": False}
    yield variant("gemv-1-tile-3parts", gemm.gemv_kernel, torch.float16, gemv_rows, tile, 3, **constants)
    if arch in tiles.TENSOR_CORES:
        rows = tiles.DOT_ROWS[bits]
        steps = [(rows[0], bucket or 65) for bucket in tiles.BUCKETS] + [(few, 16) for few in rows[1:]]
        for step, M in steps:
            for dtype in (torch.float16, torch.bfloat16):
                constants = {"GROUPS_OF": "tile", "HAS_ROWS": False, "SCALED": False}
                constants["OPERAND"] = tl.float16 if dtype == torch.float16 else tl.bfloat16
                tile = tiles.tile_of("dot", arch, bits, M, "tile")
                yield variant(f"dot-{M}-{TYPES[dtype]}-{step}", gemm.dot_kernel, dtype, step, tile, **constants)
        constants = {"GROUPS_OF": "tile", "HAS_ROWS": False, "SCALED": False, "OPERAND": tl.float16}
        tile = tiles.tile_of("dot", arch, bits, 16, "tile")
        yield variant(f"dot-16-fp16-{rows[0]}-3parts", gemm.dot_kernel, torch.float16, rows[0], tile, 3, **constants)
    for groups in ("tile", "row"):
        constants = {"GROUPS_OF": groups, "HAS_ROWS": False}
        tile, rows_of_step = tiles.tile_of("float_dot", arch, bits, 100, groups), tiles.float_dot_rows(bits, arch)
        floats = {**constants, "SCALED": True, "OPERAND": tl.float32}
        yield variant(f"float_dot-{groups}", gemm.dot_kernel, torch.float32, rows_of_step, tile, **floats)
        dx = tiles.plan_dx(bits, tiles.Device(arch, 1))
        sizes = dx.tile._replace(block_n=dx.step)
        yield variant(f"dx-{groups}", gemm_dx.gemm_dx_kernel, torch.float16, dx.tile.block_n, sizes, **constants)
    constants = {**weight, "HAS_ROWS": True, "GROUPS_OF": "block", "BLOCK_B": 8, "BLOCK_N": 64}
    yield Variant("dequantize", dequantize.dequantize_kernel, torch.float16, constants, 4, 1, 0)
    constants = {
        "BITS": bits, "FROM_SHUFFLED": False, "TO_SHUFFLED": True, "HAS_ROWS": True, "BLOCK_B": 2, "BLOCK_N": 64
    }  # fmt: skip
    yield Variant("shuffle", shuffle.reorder_kernel, torch.float16, constants, 4, 1, 0)


def in_tile(variant: Variant, tile: tiles.Tile) -> Variant:
    """The variant with another tile of its result."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    if variant.name.startswith("dx-"):  # its BLOCK_N is a step of the sum
        values = FORMATS[variant.constants["BITS"]].block_values
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_B": tile.block_n // values}
    constants = {**variant.constants, **sizes}
    return replace(variant, constants=constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def order_of_sums(compiled: Any) -> set[str]:
    """What a compiled product says of the order of its sums: its matrix instructions, and who holds which rows of W.

    Instructions of Hopper's tensor cores may differ in their columns, which do not concern a sum.
    """
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    instructions = re.findall(r"\b((?:mma|wgmma|tcgen05\.mma)[.\w:]*|v_mfma_\w+|v_wmma_\w+)", text)
    widths = re.findall(r"kWidth = \d+", compiled.asm["ttgir"])
    return {re.sub(r"n\d+k", "k", instruction) for instruction in instructions} | set(widths)


def compile_variant(variant: Variant, backend: str, arch: Any, warp_size: int) -> Any:
    """Triton's compiled kernel for a target, K and N being multiples of 16."""
    names = variant.kernel.arg_names
    floats = {"x_ptr": variant.dtype, "grad_ptr": variant.dtype, "scales_ptr": torch.float16, "out_ptr": torch.float32}
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        pointer = name.removesuffix("s") if name.endswith("_ptrs") else name
        kind = "i32"
        if pointer.endswith("_ptr"):
            kind = f"*{TYPES[floats[pointer]]}" if pointer in floats and variant.name != "shuffle" else "*i32"
        of_parts = "qweight_ptrs" in names and (name.endswith("_ptrs") or name == "N")
        signature[name] = (kind,) * variant.parts if of_parts else kind
        if pointer.endswith("_ptr") or name in ("K", "N"):
            places = [(i, part) for part in range(variant.parts)] if of_parts else [(i,)]
            attrs |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs=attrs,
    )
    options = {
        "num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False,
        "debug": variant.constants["HAS_ROWS"], "sanitize_overflow": False,
    }  # fmt: skip
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


@dataclass(frozen=True)
class DeviceCode:
    """What the machine code of a kernel is.

    Args:
        registers: of a thread.
        shared_bytes: of a program, as Triton asks for them.
        loop: the instructions of its longest loop.
    """

    registers: int
    shared_bytes: int
    loop: list[str]

    @classmethod
    def of(cls, compiled: Any, folder: Path) -> DeviceCode:
        """Of an NVIDIA GPU, by the disassembler that Triton brings."""
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run(str(BINARIES / "cuobjdump"), "-res-usage", str(path))
        (registers,) = re.findall(r"REG:(\d+)", usage)
        loops = _loops(_run(str(BINARIES / "nvdisasm"), "-c", str(path)))
        return cls(int(registers), compiled.metadata.shared, max(loops, key=len, default=[]))

    def count(self, pattern: str) -> int:
        """Instructions of the loop that match."""
        return sum(bool(re.match(pattern, instruction)) for instruction in self.loop)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(disassembly: str) -> list[list[str]]:
    """The instructions between each label and a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", line):
            instructions.append(found[1])
            target = re.search(r"\((\.L_\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append(instructions[labels[target[1]] :])
    return loops
