"""What Triton makes of the kernels, with no GPU: no spills, matrix instructions, wide loads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from exllama_ops.layout.formats import SUPPORTED_BITS

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from exllama_ops.backends.triton import tiles, tuned_tiles
from triton_backend.compiling import (
    MATRIX_INSTRUCTIONS,
    DeviceCode,
    Variant,
    compile_variant,
    in_tile,
    order_of_sums,
    variants,
)

CAPABILITIES = (75, 80, 90, 100, 120)
AMD = {"gfx942": 64, "gfx1100": 32}
# Those with tensor cores that Triton uses, as it names them.
TARGETS: dict[str, tuple[str, Any, int]] = {
    **{f"sm_{capability}": ("cuda", capability, 32) for capability in CAPABILITIES if capability >= 80},
    **{arch: ("hip", arch, warp_size) for arch, warp_size in AMD.items()},
}
QUICK = ("gemv-1-tile", "dot-16-fp16-128", "dot-65-bf16-128")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


NVIDIA_CASES = [
    pytest.param(
        capability,
        bits,
        variant,
        id=f"sm_{capability}-{bits}b-{variant.name}",
        marks=[] if (capability, bits) == (80, 4) and variant.name in QUICK else [pytest.mark.slow],
    )
    for capability in CAPABILITIES
    for bits in SUPPORTED_BITS
    for variant in variants(tiles.arch_of_capability(capability // 10), bits)
]


@pytest.mark.parametrize(("capability", "bits", "variant"), NVIDIA_CASES)
def test_machine_code_for_nvidia(capability: int, bits: int, variant: Variant, tmp_path: Path) -> None:
    code = DeviceCode.of(compile_variant(variant, "cuda", capability, 32), tmp_path)
    assert code.instructions
    # A split takes a ticket. ATOMS.OR and AND mark what is in use of the tensor memory of tcgen05.
    assert code.count(r"(RED|ATOM)G?(\.|$)|ATOMS\.(?!OR|AND)") == variant.takes_tickets, "the order of atomics differs"
    is_odd = variant.size % 16 > 0  # no model's N, for which gemv takes a few registers more than it gets
    if capability >= 80:
        assert is_odd or code.count(r"(STL|LDL)") == 0, "spills"
        assert code.shared_bytes <= 99 << 10, "more shared memory than a program has on 8.6, 8.9 and 12.0"
    if variant.uses_matrix_units and capability in (80, 120):
        assert code.count_in_loop(r"HMMA") > 0
        assert code.count_in_loop(r"FFMA") < code.count_in_loop(r"(LOP3|HMMA)")  # of scales, not of products
    elif variant.uses_matrix_units:
        assert code.count_in_loop(MATRIX_INSTRUCTIONS) > 0
    is_wide = variant.name.startswith("gemv-1-tile") or f"-{tiles.DOT_ROWS[bits][0]}" in variant.name
    if is_wide and not is_odd:
        assert code.count_in_loop(r"(LDG\S*\.128|LDGSTS\S*\.128)") > 0, "no 16-byte loads"


@pytest.mark.slow
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("arch", AMD)
def test_every_kernel_compiles_for_amd(arch: str, bits: int) -> None:
    for variant in variants(tiles.arch_of_gfx(arch), bits):
        compiled = compile_variant(variant, *TARGETS[arch])
        assert compiled.asm["hsaco"]
        assert "buffer_load" in compiled.asm["amdgcn"], f"{variant.name} is not compiled for tensors below 2 GiB"
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        assert spills == ["0"], f"{variant.name} spills"
        assert compiled.metadata.shared <= 64 << 10, f"{variant.name} has more shared memory than a program has"
        if variant.uses_matrix_units:
            assert "v_mfma" in compiled.asm["amdgcn"] or "v_wmma" in compiled.asm["amdgcn"]


@pytest.mark.parametrize(
    ("target", "bits", "form", "M"),
    [
        pytest.param(
            target, bits, form, M,
            id=f"{target}-{bits}b-{form}-{M}",
            marks=[] if (target, bits, form, M) == ("gfx942", 4, "dot", 16) else [pytest.mark.slow],
        )
        for target in TARGETS
        for bits in SUPPORTED_BITS
        for form, M in (*(("dot", bucket or 65) for bucket in tiles.BUCKETS), ("float_dot", 65), ("dx", 65))
        if bits == 4 or (form, M) == ("dot", 65)
    ],
)  # fmt: skip
def test_no_candidate_of_the_tuner_has_other_matrix_instructions(target: str, bits: int, form: str, M: int) -> None:
    """By another kind or shape of instruction, the order of a sum's products is another, and so are its bits."""
    backend, name, _ = TARGETS[target]
    arch = tiles.arch_of_gfx(name) if backend == "hip" else tiles.arch_of_capability(name // 10)
    rows = tiles.DOT_ROWS[bits][0]
    wanted = f"dot-{M}-fp16-{rows}" if form == "dot" else f"{form}-tile"
    variant = next(variant for variant in variants(arch, bits) if variant.name == wanted)
    if form == "dx":
        table = tiles.plan_dx(bits, tiles.Device(arch, 1)).tile
    else:
        table = tiles.tile_of(form, arch, bits, M, "tile")
    choices = tuned_tiles.candidates(form, arch, table)
    assert len(choices) > 3
    orders = {tile: order_of_sums(compile_variant(in_tile(variant, tile), *TARGETS[target])) for tile in choices}
    assert orders[table] or form != "dot"
    assert all(order == orders[table] for order in orders.values()), orders
