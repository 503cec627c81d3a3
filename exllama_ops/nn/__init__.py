"""Modules over the ops: the quantized Linear, the conversion of a model, and a simple quantizer."""

from exllama_ops.nn.convert import ConvertReport, convert
from exllama_ops.nn.experts import ExllamaExperts
from exllama_ops.nn.linear import ExllamaLinear
from exllama_ops.nn.linear_map import linear_sizes
from exllama_ops.nn.quantize import quantize

__all__ = ["ConvertReport", "ExllamaExperts", "ExllamaLinear", "convert", "linear_sizes", "quantize"]
