"""The Dynamo backend "exllama", ``torch.compile(model, backend="exllama")``, and its graph pass."""

from exllama_ops.compile.backend import exllama
from exllama_ops.compile.shared_input import FuseSharedInput

__all__ = ["FuseSharedInput", "exllama"]
