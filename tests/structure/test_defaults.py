"""A caller's default device and dtype change no result: what is read, saved, prepared, computed, frozen, loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exllama_ops import ExllamaLinear, convert, freeze, open_gptq, prepare, quantize, read_gptq, reference, save_gptq
from exllama_ops.layout import GptqWeight
from exllama_ops.layout.formats import SUPPORTED_BITS

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
K, N, GROUP = 64, 96, 32


@contextmanager
def set_defaults() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a weight, a module or a list."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [part for part in (value, *vars(value).values()) if isinstance(part, Tensor)]


def matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(CPU).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype, device=CPU)


def weight(bits: int = 4, act_order: bool = True, out_features: int = N, seed: int = 0) -> GptqWeight:
    groups = torch.arange(K, dtype=torch.int32, device=CPU) // GROUP
    generator = torch.Generator(CPU).manual_seed(seed)
    order = torch.randperm(K, generator=generator, dtype=torch.int64, device=CPU)
    bias = matrix(1, out_features)[0]
    return quantize(matrix(out_features, K, seed), bits, GROUP, g_idx=groups[order] if act_order else None, bias=bias)


class Block(nn.Module):
    """Two projections of one x, of which `freeze` makes one, and one that takes their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(K, N, bias=False, device="meta", dtype=torch.float32) for _ in range(2))
        self.down = nn.Linear(N, K, bias=False, device="meta", dtype=torch.float32)
        down = quantize(matrix(K, N, 3), 4, GROUP)
        convert(self, {"gate": weight(seed=1), "up": weight(seed=1), "down": down})

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


def every_bits(function: Callable[[int], Any]) -> list[Any]:
    return [function(bits) for bits in SUPPORTED_BITS]


def read(tmp_path: Path) -> Any:
    checkpoints = [open_gptq(path.parent) for path in sorted(DATA.glob("*/quantize_config.json"))]
    quantized = [next(iter(checkpoint.weights().values())) for checkpoint in checkpoints]
    return [*quantized, *(checkpoint.read_tensor(checkpoint.dense[0]) for checkpoint in checkpoints)]


def read_all(tmp_path: Path) -> Any:
    return list(read_gptq(DATA / "tiny-w3g32-asym-act-v2", progress=False).values())


def read_without_zeros(tmp_path: Path) -> Any:
    save_gptq(tmp_path, {"m": quantize(matrix(N, K), 4, GROUP, sym=True)}, sym=True, desc_act=False)
    from safetensors.torch import load_file, save_file

    with torch.device("cpu"):  # not ours
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["m.qzeros"]
        save_file(tensors, tmp_path / "model.safetensors")
    return open_gptq(tmp_path).read("m")


def save(tmp_path: Path) -> Any:
    save_gptq(tmp_path, {"m": weight(3), "s": weight(3, act_order=False)}, sym=False, desc_act=True)
    content = (tmp_path / "model.safetensors").read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def ops(tmp_path: Path) -> Any:
    x = matrix(3, K, dtype=torch.float16).requires_grad_()
    layers = every_bits(lambda bits: ExllamaLinear.from_weight(weight(bits)))
    results = [layer(x) for layer in layers]
    (gradient,) = torch.autograd.grad(sum(result.sum() for result in results), x)
    back = every_bits(lambda bits: ExllamaLinear.from_weight(weight(bits)).to_weight())
    return [layers, results, gradient, back]


def references(tmp_path: Path) -> Any:
    def compute(bits: int) -> list[Tensor]:
        packed = prepare(weight(bits))
        args = (packed.qweight, packed.qzeros, packed.scales, packed.row_order, packed.shuffled, bits, True, GROUP)
        x, grad = matrix(3, K, dtype=torch.bfloat16), matrix(3, N, dtype=torch.bfloat16)
        multi = reference.gptq_gemm_multi(x, *([part] for part in args[:3]), *args[3:])
        dequantized = reference.gptq_dequantize(*args)
        return [reference.gptq_gemm(x, *args), reference.gptq_gemm_dx(grad, *args), dequantized, multi]

    return every_bits(compute)


def fused(tmp_path: Path) -> Any:
    block, x = Block(), matrix(3, K)
    assert freeze(block, (x,)).fused
    return [block, block(x)]


def compiled(tmp_path: Path) -> Any:
    torch._dynamo.reset()
    return torch.compile(Block(), backend="aot_eager", fullgraph=True)(matrix(3, K))


def loaded(tmp_path: Path) -> Any:
    pytest.importorskip("transformers", reason='needs the extra "hf"')
    from exllama_ops.integrations.generation import CompiledGenerator
    from exllama_ops.integrations.transformers import load_model

    model = load_model(DATA / "tiny-w4g64-lmhead", device="cpu", progress=False)
    ids = torch.arange(8, dtype=torch.int64, device=CPU)
    tokens = list(CompiledGenerator(model, compile=False).generate(ids, 4))
    return [model, model(ids.unsqueeze(0)).logits, torch.tensor(tokens, dtype=torch.int64, device=CPU)]


def prepared(tmp_path: Path) -> Any:
    return every_bits(lambda bits: prepare(weight(bits)))


def check(case: Callable[[Path], Any], defaults: AbstractContextManager[Any], tmp_path: Path) -> None:
    expected = tensors_of(case(tmp_path / "without"))
    with defaults:
        got = tensors_of(case(tmp_path / "with"))
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert (one.device, one.dtype) == (other.device, other.dtype)
        assert torch.equal(one, other)


QUICK = (read, read_all, read_without_zeros, save, prepared, ops, references)


@pytest.mark.parametrize("case", [*QUICK, fused, compiled, loaded], ids=lambda case: case.__name__)
def test_set_defaults_change_no_result(case: Callable[[Path], Any], tmp_path: Path) -> None:
    check(case, set_defaults(), tmp_path)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_a_device_as_a_context_changes_no_result(case: Callable[[Path], Any], tmp_path: Path) -> None:
    check(case, torch.device("meta"), tmp_path)


def test_a_layer_without_a_device_is_made_on_the_default_one() -> None:
    """As nn.Linear is."""
    with torch.device("meta"):
        layer, ours = nn.Linear(K, N), ExllamaLinear(K, N, 4, GROUP, act_order=True)
    assert layer.weight.is_meta
    assert all(buffer.is_meta for buffer in ours.buffers())
