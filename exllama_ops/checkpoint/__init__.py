"""Checkpoints: files on disk to `GptqWeight` and back. Every quirk of the files ends here.

`open_checkpoint` asks each format whether it takes a folder. A format is one file here, such as gptq.py, and its entry
in ``opening.FORMATS``. What the file must have is `Format`.
"""

from exllama_ops.checkpoint.base import Checkpoint, Format, ModuleSummary
from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.gptq import GptqCheckpoint, open_gptq, read_gptq
from exllama_ops.checkpoint.module import GptqModule
from exllama_ops.checkpoint.opening import open_checkpoint
from exllama_ops.checkpoint.save import save_gptq

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Format",
    "GptqCheckpoint",
    "GptqConfig",
    "GptqModule",
    "ModuleConfig",
    "ModuleSummary",
    "open_checkpoint",
    "open_gptq",
    "read_gptq",
    "save_gptq",
]
