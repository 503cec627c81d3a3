"""What is done to a model before it is compiled or leaves PyTorch, and while `torch.compile` traces it.

The Dynamo backend "exllama", ``torch.compile(model, backend="exllama")``, with its graph pass; `freeze`;
`decompositions`; `onnx_program`.
"""

from exllama_ops.compile.backend import exllama
from exllama_ops.compile.shared_input import FuseSharedInput

__all__ = ["FuseSharedInput", "exllama"]
