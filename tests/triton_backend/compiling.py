"""Kernels of the Triton backend compiled for GPUs that are not there, as a launch on them would compile them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from exllama_ops.backends.triton import dequantize, gemm, gemm_dx, moe_gemm, shuffle, splits, tiles
from exllama_ops.backends.triton.launch import compile_options
from exllama_ops.layout.formats import FORMATS

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# These are mma.sync, wgmma and tcgen05 in machine code.
MATRIX_INSTRUCTIONS = r"(HMMA|HGMMA|UTC\w*MMA)"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """A kernel with what is compiled into it.

    Args:
        name: of the test.
        kernel: as Triton has it.
        constants: its constexpr arguments.
        num_warps: warps of a program.
        num_stages: steps whose loads are under way at once.
        weights: that a thread takes in a round of its loop.
        dtype: of x or grad.
        out: the dtype of the result, None for that of x or grad.
        size: K and N.
        parts: how many weights share a launch of gptq_gemm_multi.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    weights: float = 0
    dtype: torch.dtype = torch.float16
    out: torch.dtype | None = None
    size: int = 4096
    parts: int = 1

    @property
    def uses_matrix_units(self) -> bool:
        return self.name.startswith("dot-")

    @property
    def takes_tickets(self) -> bool:
        return "tickets_ptr" in self.kernel.arg_names and "tickets_ptr" not in self.constants


def variants(arch: str, bits: int) -> Iterator[Variant]:
    """Every kernel for a class of devices and a width, in every tile of the table; with 4 bits, every option too."""
    values = FORMATS[bits].block_values
    weight = {"BITS": bits, "SHUFFLED": True, "ZERO_OFFSET": 0, "HAS_ROW_ORDER": False, "GROUPS_OF": "tile"}
    one, whole = {"expert_offsets_ptr": None, "E": 0}, splits.arguments_of_splits(None, None)[1]
    experts = {"E": 128}
    raw = {"SHUFFLED": False, "HAS_ROW_ORDER": True, "GROUPS_OF": "row"}

    def product(name: str, kernel: Any, rows: int, tile: tiles.Tile, **options: Any) -> Variant:
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_B": rows // values, "BLOCK_N": tile.block_n}
        weights = rows * tile.block_n / (32 * tile.num_warps)
        of_variant = {key: options.pop(key) for key in ("dtype", "out", "size", "parts") if key in options}
        form = name.partition("-")[0]
        has_tickets = arch not in ("cdna", "rdna") and form != "dx" and tiles.adds_splits(form, tile)
        tickets = {} if has_tickets else {"tickets_ptr": None}
        constants = {**weight, **options, **sizes, **(tickets if "tickets_ptr" in kernel.arg_names else {})}
        return Variant(name, kernel, constants, tile.num_warps, tile.num_stages, weights, **of_variant)

    def gemv(name: str, M: int, **options: Any) -> Variant:
        tile = tiles.tile_of("gemv", arch, bits, M, options.get("GROUPS_OF", "tile"))
        options = (experts if name.endswith("experts") else one) | options
        return product(f"gemv-{M}-{name}", gemm.gemv_kernel, tiles.gemv_blocks(bits) * values, tile, **options)

    def dot(name: str, M: int, step: int, dtype: torch.dtype = torch.float16, **options: Any) -> Variant:
        tile = tiles.tile_of("dot", arch, bits, M, "tile")
        operand = {"SCALED": False, "OPERAND": tl.float16 if dtype == torch.float16 else tl.bfloat16}
        options = (experts if name.endswith("experts") else one) | options
        name = f"dot-{M}-{TYPES[dtype]}-{step}{name}"
        return product(name, gemm.dot_kernel, step, tile, dtype=dtype, **operand, **options)

    def float_dot(groups: str, name: str = "", **options: Any) -> Variant:
        tile, rows = tiles.tile_of("float_dot", arch, bits, 100, groups), tiles.float_dot_rows(bits, arch)
        options |= {"GROUPS_OF": groups, "SCALED": True, "OPERAND": tl.float32, "dtype": torch.float32}
        options = (experts if name.endswith("experts") else one) | options
        return product(f"float_dot-{groups}{name}", gemm.dot_kernel, rows, tile, **options)

    def dx(name: str, **options: Any) -> Variant:
        plan = tiles.plan_dx(bits, tiles.Device(arch, 1))
        tile = plan.tile._replace(block_n=plan.step)
        options = {"FILLED": False, "out": torch.float32} | (experts if name.endswith("experts") else one) | options
        return product(f"dx-{name}", gemm_dx.gemm_dx_kernel, plan.tile.block_n, tile, **options)

    def dequantized(name: str, **options: Any) -> Variant:
        constants = {**weight, **options, "BLOCK_B": dequantize.BLOCK_B, "BLOCK_N": dequantize.BLOCK_N}
        return Variant(f"dequantize{name}", dequantize.dequantize_kernel, constants, out=torch.float16)

    def reordered(name: str, from_shuffled: bool, to_shuffled: bool, has_rows: bool) -> Variant:
        constants = {
            "BITS": bits,
            "FROM_SHUFFLED": from_shuffled,
            "TO_SHUFFLED": to_shuffled,
            "HAS_ROW_ORDER": has_rows,
        }
        constants |= {"BLOCK_B": shuffle.BLOCK_B, "BLOCK_N": shuffle.BLOCK_N}
        return Variant(name, shuffle.reorder_kernel, constants, out=torch.int32)

    has_matrix_units, widest = arch in tiles.TENSOR_CORES, tiles.DOT_ROWS[bits][0]
    for M in (1, tiles.GEMV_ROWS):
        yield gemv("tile", M)
        yield gemv("block-perm", M, GROUPS_OF="block", HAS_ROW_ORDER=True)
        yield gemv("row", M, GROUPS_OF="row")
    yield gemv("tile-3parts", 1, parts=3)
    for M in (1, tiles.GEMV_ROWS):
        yield gemv("block-perm-experts", M, GROUPS_OF="block", HAS_ROW_ORDER=True)
    if has_matrix_units:
        for dtype in (torch.float16, torch.bfloat16):
            for bucket in tiles.BUCKETS:
                yield dot("", bucket or 65, widest, dtype)
            for step in tiles.DOT_ROWS[bits][1:]:
                yield dot("", 16, step, dtype)
        yield dot("-3parts", 16, widest, parts=3)
        for bucket in tiles.BUCKETS:
            yield dot("-experts", bucket or 65, widest)
    yield float_dot("tile", "-experts")
    for groups in ("tile", "row"):
        yield float_dot(groups)
        yield dx(groups, GROUPS_OF=groups)
    yield dequantized("", GROUPS_OF="block", HAS_ROW_ORDER=True)
    yield reordered("shuffle", False, True, True)
    if bits != 4:
        return
    yield gemv("row-perm", 4, GROUPS_OF="row", HAS_ROW_ORDER=True)
    yield gemv("raw", 1, **raw)
    yield gemv("tile-bf16", 4, dtype=torch.bfloat16)
    yield gemv("block-fp32", 4, GROUPS_OF="block", dtype=torch.float32)
    yield gemv("tile-v1-whole-K", 1, ZERO_OFFSET=1, **whole)
    yield gemv("tile-odd", 1, size=4104)
    if has_matrix_units:
        yield dot("-v1-whole-K", 16, widest, ZERO_OFFSET=1, **whole)
        yield dot("-v1-whole-K", 16, widest, torch.bfloat16, ZERO_OFFSET=1, **whole)
        yield dot("-odd", 16, widest, size=4104)
    yield float_dot("block", HAS_ROW_ORDER=True)
    yield gemv("raw-experts", 1, **raw)
    for is_filled in (False, True):
        constants = {"FILLED": is_filled, "E": 128, "BLOCK_M": moe_gemm.BLOCK_M, "BLOCK_K": moe_gemm.BLOCK_K}
        yield Variant(f"gather-experts-{is_filled}", moe_gemm.gather_kernel, constants, out=torch.float16)
    yield dx("block-perm", GROUPS_OF="block", HAS_ROW_ORDER=True, out=torch.float16)
    yield dx("raw", **raw)
    yield dx("block-perm-experts", GROUPS_OF="block", HAS_ROW_ORDER=True)
    yield dx("tile-filled-experts", HAS_ROW_ORDER=True, FILLED=True)
    yield dequantized("-tile")
    yield dequantized("-raw", **raw)
    yield reordered("shuffle-sorted", False, True, False)
    yield reordered("unshuffle", True, False, False)
    yield reordered("unshuffle-rows", False, False, True)
    for parts in (1, 3):
        yield Variant(f"add_splits-{parts}parts", splits.add_splits_kernel, {"BLOCK": splits.ADD_BLOCK}, parts=parts)


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


class _Driver:
    """What Triton asks of a driver before it compiles. A device is its target: Triton keeps kernels by the device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def targeting(target: GPUTarget) -> Iterator[None]:
    """Have Triton compile for a target, which can launch nothing."""
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(None)  # the next to ask gets the default


def arguments_of(variant: Variant) -> dict[str, Any]:
    """What a launch of the variant gives its kernel beside constants: tensors without memory, and sizes."""
    dtypes = {
        "x_ptr": variant.dtype,
        "grad_ptr": variant.dtype,
        "scales_ptr": torch.float16,
        "out_ptr": variant.out or variant.dtype,
    }
    dtypes |= {"partials_ptr": torch.float32}
    arguments: dict[str, Any] = {}
    for name in variant.kernel.arg_names:
        if name in variant.constants:
            continue
        pointer = name.removesuffix("s") if name.endswith("_ptrs") else name
        if pointer.endswith("_ptr"):
            argument: Any = torch.empty(0, dtype=dtypes.get(pointer, torch.int32))
        else:
            argument = variant.size if name in ("K", "N") else 3
        of_parts = name.endswith("_ptrs") or (name == "N" and variant.kernel in _OF_PARTS)
        arguments[name] = (argument,) * variant.parts if of_parts else argument
    return arguments


_OF_PARTS = (gemm.gemv_kernel, gemm.dot_kernel, splits.add_splits_kernel)


def compile_variant(variant: Variant, backend: str, arch: Any, warp_size: int) -> Any:
    """Triton's compiled kernel for a target: by Triton's own reading of the arguments of a launch."""
    target = GPUTarget(backend, arch, warp_size)
    with targeting(target):
        compiled = variant.kernel.warmup(
            **arguments_of(variant),
            **variant.constants,
            grid=(1,),
            num_warps=variant.num_warps,
            num_stages=variant.num_stages,
            **compile_options(variant.constants),
        )
    del variant.kernel.device_caches[target]  # hundreds of kernels would stay in memory
    return compiled


@dataclass(frozen=True)
class DeviceCode:
    """What the machine code of a kernel is.

    Args:
        registers: of a thread.
        shared_bytes: of a program, as Triton asks for them.
        instructions: all of them.
        loop: those of its longest loop, of those with matrix instructions if there are any: code that the compiler puts
            behind the kernel to wait in, and that jumps back, looks like a loop too.
    """

    registers: int
    shared_bytes: int
    instructions: list[str]
    loop: list[str]

    @classmethod
    def of(cls, compiled: Any, folder: Path) -> DeviceCode:
        """The machine code of an NVIDIA GPU, by the disassembler that Triton brings."""
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run(str(BINARIES / "cuobjdump"), "-res-usage", str(path))
        (registers,) = re.findall(r"REG:(\d+)", usage)
        instructions, loops = _code(_run(str(BINARIES / "nvdisasm"), "-c", str(path)))
        multiplying = [loop for loop in loops if count(MATRIX_INSTRUCTIONS, loop)]
        longest: list[str] = max(multiplying or loops, key=len, default=[])
        return cls(int(registers), compiled.metadata.shared, instructions, longest)

    def count(self, pattern: str) -> int:
        """Instructions of the kernel that match."""
        return count(pattern, self.instructions)

    def count_in_loop(self, pattern: str) -> int:
        """Instructions of the loop that match."""
        return count(pattern, self.loop)


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.match(pattern, instruction)) for instruction in instructions)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code(disassembly: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those between each label and a branch back to it."""
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
    return instructions, loops
