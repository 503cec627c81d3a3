"""What the shapes of quantized modules say of bits and group size, for files that have no config."""

from __future__ import annotations

import warnings
from pathlib import Path

from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.files import TensorFiles
from exllama_ops.layout import SUPPORTED_BITS

_WAY_OUT = (
    "if its files are GPTQ's all the same, pass --bits and --group-size, or quantization_config={'bits': ..., "
    "'group_size': ...}, as the tool that wrote them was told"
)


def what_to_say(directory: Path, meant: str | None = None) -> str:
    """What to pass for files without a config, by the headers of those that are there.

    Args:
        directory: where they are.
        meant: as in `TensorFiles`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files = TensorFiles(directory, meant)
    except CheckpointError:
        return _WAY_OUT
    modules = [name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")]
    if not modules:
        return "its files have no tensor NAME.qweight, so they are not quantized as GPTQ"
    kinds = {name: _bits(files, name) for name in modules}
    widths = set.intersection(*kinds.values())
    if len(widths) != 1:
        return _WAY_OUT
    bits = widths.pop()
    size = _group_size(files, modules, bits)
    if size is None:
        return f"the shapes allow bits={bits}: {_WAY_OUT}"
    return (
        f"the shapes allow bits={bits}, group_size={size}: pass --bits {bits} --group-size {size}, or "
        f"quantization_config={{'bits': {bits}, 'group_size': {size}}}"
    )


def _bits(files: TensorFiles, module: str) -> set[int]:
    """The widths that a module's shapes allow: its qzeros and its g_idx each leave one."""
    qweight = files.tensors[f"{module}.qweight"].shape
    scales, qzeros = files.tensors.get(f"{module}.scales"), files.tensors.get(f"{module}.qzeros")
    g_idx = files.tensors.get(f"{module}.g_idx")
    if len(qweight) != 2 or scales is None:
        return set()
    return {
        bits
        for bits in SUPPORTED_BITS
        if (qzeros is None or qzeros.shape[1:] == (qweight[1] * bits // 32,))
        and (g_idx is None or g_idx.shape == (qweight[0] * 32 // bits,))
    }


def _group_size(files: TensorFiles, modules: list[str], bits: int) -> int | None:
    """The group size that all shapes allow: a power of two if one does, -1 where each module is one group."""
    smallest, largest, exact, whole = 1, 2**31, set[int](), True
    for module in modules:
        K = files.tensors[f"{module}.qweight"].shape[0] * 32 // bits
        G = files.tensors[f"{module}.scales"].shape[0]
        if not 1 <= G <= K:
            return None
        whole = whole and G == 1
        # What divides K into G groups, the last of which may be partial.
        smallest = max(smallest, -(-K // G))
        largest = largest if G == 1 else min(largest, -(-K // (G - 1)) - 1)
        exact.add(K // G if K % G == 0 else 0)
    if whole:
        return -1
    # Tools choose powers of two, and a last group that is partial leaves a range of sizes.
    power = 1 << (smallest - 1).bit_length()
    fitting = [size for size in exact if smallest <= size <= largest]
    return power if power <= largest else min(fitting, default=None)
