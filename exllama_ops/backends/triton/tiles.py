"""The choice of the kernel that computes a gptq_gemm, and of its tiles: pure functions of the problem, and a table.

What could change a result's bits is never tuned. The form, the rows of a step and the split of K are functions of the
problem and the device, in batch-invariant mode without M. The table holds the rest: a tile's extent in M and N, warps,
stages. So bits repeat on GPUs of one kind; a GPU of another has other tensor cores, or fills with other splits.
It was chosen by what the kernels compile to (no spills, instructions per weight), as no GPU has run them:
benchmarks/results/triton-device-code.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from exllama_ops.backends.triton.arguments import groups_of
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.weight import Weight

# sm75: Triton multiplies on the CUDA cores. sm80: mma.sync (8.x and 12.x). sm90: wgmma. sm100: tcgen05 (10.x, 11.x).
# cdna, rdna: AMD's matrix cores, of gfx9 and of gfx11 and later. other: devices of which nothing is known.
# host: Triton's interpreter, which takes its time by the operation, whatever its size.
ARCHS = ("sm75", "sm80", "sm90", "sm100", "cdna", "rdna", "other", "host")
TENSOR_CORES = ("sm80", "sm90", "sm100", "cdna", "rdna", "host")

FORMS = ("gemv", "dot", "float_dot")

# Rows of x that gemv takes at once. From one more on, float_dot reads the words less often.
GEMV_ROWS = 4
# Blocks in a step of gemv: words for a 16-byte load or two by each of 128 threads, in as many registers as there are.
_GEMV_BLOCKS = {2: 16, 3: 8, 4: 16, 8: 16}
# Rows of W in a step of dot, the first that groups allow; a step of 8 bits takes as many words as one of 4.
DOT_ROWS = {2: (128, 64, 32, 16), 3: (128, 64, 32), 4: (128, 64, 32, 16), 8: (64, 32, 16)}
# Rows in a step of float_dot. They are few, since a thread holds its operands whole.
_FLOAT_DOT_ROWS = {2: 16, 3: 32, 4: 16, 8: 16}
# Columns of W in a step of gptq_gemm_dx: as few.
_DX_COLUMNS = 16

# What a bit width needs beside its row in layout/formats.py.
_OF_WIDTHS: dict[str, Mapping[int, object]] = {
    "_GEMV_BLOCKS": _GEMV_BLOCKS,
    "DOT_ROWS": DOT_ROWS,
    "_FLOAT_DOT_ROWS": _FLOAT_DOT_ROWS,
}


@functools.cache
def check_width(op: str, bits: int) -> None:
    """Refuse a width that the kernels have not been told of.

    Raises:
        NotImplementedError: a table lacks it; the text names all that do.
    """
    lacking = [name for name, table in _OF_WIDTHS.items() if bits not in table]
    if lacking:
        raise NotImplementedError(
            f"{op}: Triton's kernels have no tiles for {bits} bits: backends/triton/tiles.py lacks that width in "
            f"{', '.join(lacking)}"
        )


@dataclass(frozen=True)
class Device:
    """What the choice depends on: a class of `ARCHS`, and how many programs run side by side."""

    arch: str
    processors: int


# Few processors, so that small weights are split too.
HOST = Device("host", 2)


class Tile(NamedTuple):
    """What may be tuned.

    Args:
        block_m: rows of the result.
        block_n: columns of the result: of W, or rows of W in gptq_gemm_dx.
        num_warps: warps of a program.
        num_stages: steps whose loads are under way at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """A form, its tile, and how K is divided.

    Args:
        form: one of `FORMS`.
        tile: its tile.
        block_b: blocks of words in a step.
        groups_of: how far a group reaches in a step.
        splits: parts of K, whose sums are added from the first to the last.
        steps_per_split: steps in each.
    """

    form: str
    tile: Tile
    block_b: int
    groups_of: str
    splits: int
    steps_per_split: int


# (arch, bits, tokens up to this many) -> tile of dot. Below 64 rows sm90 and sm100 use mma.sync, from there on wgmma
# and tcgen05, which need groups of four warps.
BUCKETS = (16, 32, 64, None)
_DOT_TILES: dict[tuple[str, int, int | None], Tile] = {}
for _arch in TENSOR_CORES:
    for _bits in FORMATS:
        _DOT_TILES |= {
            (_arch, _bits, 16): Tile(16, 64, 4, 3),
            (_arch, _bits, 32): Tile(32, 64, 4, 3),
            (_arch, _bits, 64): Tile(64, 64, 4, 3),
            (_arch, _bits, None): Tile(64, 128, 8, 3),
        }
        if _arch == "rdna":  # which holds a matrix instruction's operands twice, and spills in the tiles above
            _DOT_TILES |= {(_arch, _bits, bucket): Tile(32, 64, 8, 3) for bucket in BUCKETS[1:]}
# Triton gives four warps of sm100 168 registers each, in which the 32 weights of a block of 3 bits spill.
_DOT_TILES["sm100", 3, 32] = Tile(32, 64, 8, 3)


@dataclass(frozen=True)
class DxPlan:
    """How a gptq_gemm_dx is computed: ``step`` columns of W at a time, from the first to the last."""

    tile: Tile
    step: int
    form: ClassVar[str] = "dx"


def plan_dx(bits: int, device: Device) -> DxPlan:
    """The table of gptq_gemm_dx."""
    if device.arch == "host":
        return DxPlan(Tile(64, 256, 4, 1), 64)
    if device.arch == "rdna":
        return DxPlan(Tile(32, 32 if bits == 3 else 64, 4, 1), _DX_COLUMNS)
    spills_with_two = device.arch == "sm90" and bits in (3, 4)
    return DxPlan(Tile(32, 64, 4, 1 if spills_with_two else 2), _DX_COLUMNS)


def bucket_of(M: int) -> int | None:
    """The M of the table that serves M tokens."""
    return next(bucket for bucket in BUCKETS if bucket is None or bucket >= M)


def tile_of(form: str, arch: str, bits: int, M: int, groups_of: str) -> Tile:
    """The table. Its columns do not depend on M in gemv, which may have to be batch-invariant."""
    if form == "gemv":
        # Fewer columns than threads: Triton then gives scales and zero points the layout of the words. Rows of many
        # groups, the 32 weights of a block of 3 bits and what rdna holds of a block spill in four warps.
        is_row = groups_of == "row"
        num_warps = 8 if arch == "rdna" or is_row or (bits == 3 and M > 1) else 4
        block_n = 32 if bits == 3 and is_row else 64
        return Tile(1 if M == 1 else GEMV_ROWS, block_n, num_warps, 1)
    if arch == "host":
        return Tile(64, 128, 4, 1)
    if form == "float_dot":
        has_registers = arch != "rdna" and not (bits == 3 and groups_of == "row")
        return Tile(32, 64, 8 if bits == 3 else 4, 2 if has_registers else 1)
    return _DOT_TILES[arch, bits, bucket_of(M)]


def adds_splits(form: str, tile: Tile) -> bool:
    """Whether the last program of a tile adds up the splits: where the sums are few. A second kernel does it elsewhere.

    In larger tiles the code would spill, and more rows of x take longer than a launch anyway.
    """
    return tile.block_m <= {"gemv": 1, "dot": 32, "float_dot": 0}[form]


def dot_rows(weight: Weight) -> int | None:
    """Rows in a step of dot: all in one group, and at least the 16 of a matrix instruction. None if no step does."""
    fits = (rows for rows in DOT_ROWS[weight.bits] if groups_of(weight, rows) == "tile")
    return next(fits, None)


def gemv_blocks(bits: int) -> int:
    """Blocks of words in a step of gemv."""
    return _GEMV_BLOCKS[bits]


def float_dot_rows(bits: int, arch: str) -> int:
    """Rows in a step of float_dot."""
    return _FLOAT_DOT_ROWS[bits] * (8 if arch == "host" else 1)


def form_of(M: int, weight: Weight, dtype: torch.dtype, device: Device, batch_invariant: bool) -> str:
    """The form that computes ``M`` rows of x in ``dtype``."""
    if dtype != torch.float32 and device.arch in TENSOR_CORES and dot_rows(weight) is not None:
        return "dot" if M > 1 or batch_invariant else "gemv"
    return "gemv" if M <= GEMV_ROWS or batch_invariant else "float_dot"


def rows_of_each(M: int, experts: int) -> int:
    """The rows of x that an expert has by a plan."""
    return -(-M // experts)


def plan_gemm(
    M: int, weight: Weight, dtype: torch.dtype, device: Device, batch_invariant: bool, experts: int = 1
) -> Plan:
    """How a gptq_gemm is computed, or a gptq_moe_gemm. In batch-invariant mode a row's sum is the same whatever M is.

    The host does not know the rows of an expert. It plans for as many as each has where all have equally many.
    """
    with_rows, M = min(experts, M), rows_of_each(M, experts)
    form = form_of(M, weight, dtype, device, batch_invariant)
    values = FORMATS[weight.bits].block_values
    if form == "gemv":
        block_b = _GEMV_BLOCKS[weight.bits]
    else:
        rows = dot_rows(weight) if form == "dot" else None
        block_b = (rows or float_dot_rows(weight.bits, device.arch)) // values
    reach = groups_of(weight, block_b * values)
    tile = tile_of(form, device.arch, weight.bits, 1 if batch_invariant and form == "dot" else M, reach)
    steps = -(-weight.K // (block_b * values))
    programs = -(-weight.N // tile.block_n) * (1 if batch_invariant else with_rows * -(-M // tile.block_m))
    # Four programs on each processor, and two steps in each program.
    wanted = -(-4 * device.processors // programs)
    steps_per_split = -(-steps // max(1, min(wanted, steps // 2)))
    splits = -(-steps // steps_per_split)
    return Plan(form, tile, block_b, reach, splits, steps_per_split)


def device_of(device: torch.device) -> Device:
    """What is known of the device of a tensor."""
    return HOST if device.type == "cpu" else _device(device.type, device.index)


@functools.cache
def _device(kind: str, index: int) -> Device:
    if kind != "cuda":
        return Device("other", 64)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        return Device(arch_of_capability(properties.major), properties.multi_processor_count)
    return Device(arch_of_gfx(properties.gcnArchName), properties.multi_processor_count)


def arch_of_capability(major: int) -> str:
    """The architecture of an NVIDIA GPU, by its compute capability."""
    if major < 8:
        return "sm75"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def arch_of_gfx(name: str) -> str:
    """The architecture of an AMD GPU, by its name."""
    name = name.partition(":")[0]
    if name.startswith(("gfx90a", "gfx94", "gfx95")):
        return "cdna"
    return "rdna" if name.startswith(("gfx11", "gfx12")) else "other"
