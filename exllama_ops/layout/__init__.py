"""The bit formats of GPTQ weights, in plain PyTorch: no arithmetic on the values, no ops, no files."""

from exllama_ops.layout.formats import FORMATS, SUPPORTED_BITS
from exllama_ops.layout.pack import pack_columns, pack_rows, unpack_columns, unpack_rows, unpack_zeros
from exllama_ops.layout.shuffle import shuffle, unshuffle
from exllama_ops.layout.weight import GptqWeight, PackedWeight

__all__ = [
    "FORMATS",
    "SUPPORTED_BITS",
    "GptqWeight",
    "PackedWeight",
    "pack_columns",
    "pack_rows",
    "shuffle",
    "unpack_columns",
    "unpack_rows",
    "unpack_zeros",
    "unshuffle",
]
