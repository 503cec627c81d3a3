"""What the kernels compile to, as a table: ``PYTHONPATH=tests python -m triton_backend.record >
benchmarks/results/triton-device-code.md``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import triton

from exllama_ops.backends.triton import tiles
from exllama_ops.layout.formats import SUPPORTED_BITS
from triton_backend.compiling import MATRIX_INSTRUCTIONS, DeviceCode, compile_variant, variants

CAPABILITIES = (75, 80, 90, 100, 120)
NAMES = ("gemv-1-tile", "gemv-4-tile", "dot-16-fp16", "dot-65-fp16", "float_dot-tile", "dx-tile")


def main() -> None:
    print(f"Loops of the Triton kernels, compiled by Triton {triton.__version__} and never run on a GPU.\n")
    columns = ("sm", "bits", "kernel", "registers", "shared bytes", "instructions per weight", "matrix instructions")
    print("|", *(f"{column} |" for column in (*columns, "spills")))
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for capability in CAPABILITIES:
            for bits in SUPPORTED_BITS:
                widest = f"-{tiles.DOT_ROWS[bits][0]}"
                for variant in variants(tiles.arch_of_capability(capability // 10), bits):
                    if variant.name not in NAMES and variant.name.removesuffix(widest) not in NAMES:
                        continue
                    code = DeviceCode.of(compile_variant(variant, "cuda", capability, 32), Path(folder))
                    cells = (
                        capability, bits, variant.name, code.registers, code.shared_bytes,
                        f"{len(code.loop) / variant.weights:.1f}", code.count_in_loop(MATRIX_INSTRUCTIONS),
                        code.count(r"(STL|LDL)"),
                    )  # fmt: skip
                    print("|", *(f"{cell} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
