"""What Triton makes of the kernels, with no GPU: no spills, matrix instructions, wide loads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET=1 replaces it", allow_module_level=True)

from exllama_ops.backends.triton import tiles
from triton_backend.compiling import DeviceCode, compile_variant, variants

CAPABILITIES = (75, 80, 90, 100, 120)
AMD = {"gfx942": 64, "gfx1100": 32}
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
    for bits in (2, 3, 4, 8)
    for variant in variants(tiles.arch_of_capability(capability // 10), bits)
]


@pytest.mark.parametrize(("capability", "bits", "variant"), NVIDIA_CASES)
def test_machine_code_for_nvidia(capability: int, bits: int, variant: object, tmp_path: Path) -> None:
    code = DeviceCode.of(compile_variant(variant, "cuda", capability, 32), tmp_path)
    if capability >= 80:
        assert code.count(r"(STL|LDL)") == 0, "spills in the loop"
        assert code.shared_bytes <= 99 << 10, "more shared memory than a program has on 8.6, 8.9 and 12.0"
    if variant.uses_matrix_units and capability in (80, 120):
        assert code.count(r"HMMA") > 0
        assert code.count(r"FFMA") < code.count(r"LOP3") + code.count(r"HMMA")  # of scales, not of products
    elif variant.uses_matrix_units:
        assert code.count(r"(HMMA|HGMMA|UTCHMMA|UTC\w*MMA)") > 0
    if variant.name in QUICK:
        assert code.count(r"(LDG\S*\.128|LDGSTS\S*\.128)") > 0, "no 16-byte loads"


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("arch", AMD)
def test_every_kernel_compiles_for_amd(arch: str, bits: int) -> None:
    for variant in variants(tiles.arch_of_gfx(arch), bits):
        compiled = compile_variant(variant, "hip", arch, AMD[arch])
        assert compiled.asm["hsaco"]
        if variant.uses_matrix_units:
            assert "v_mfma" in compiled.asm["amdgcn"] or "v_wmma" in compiled.asm["amdgcn"]
