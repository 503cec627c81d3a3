"""GPTQ checkpoints: files on disk to `GptqWeight` and back. Every quirk of the files ends here."""

from exllama_ops.checkpoint.config import GptqConfig, ModuleConfig
from exllama_ops.checkpoint.errors import CheckpointError
from exllama_ops.checkpoint.gptq import GptqCheckpoint, open_gptq, read_gptq
from exllama_ops.checkpoint.save import save_gptq

__all__ = [
    "CheckpointError",
    "GptqCheckpoint",
    "GptqConfig",
    "ModuleConfig",
    "open_gptq",
    "read_gptq",
    "save_gptq",
]
