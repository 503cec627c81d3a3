"""Peers on a GPU, where none is: what they say without their library, and what they hand to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import exllama_ops
from benchmarks.cases import Case, Weight, activations
from benchmarks.conformance import relative_error
from benchmarks.peers import CUDA_PEERS
from benchmarks.peers.peer import Layer, Unsupported
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.layout.pack import unpack_columns, unpack_rows

PEERS = {peer.name: peer for peer in CUDA_PEERS}
TINYGEMM = PEERS["torch tinygemm bf16"]
# This holds for products of 256 rows whose operands are float16.
TOLERANCE = 2e-3


def modules_of(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module with attributes, and the packages that it lies in."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.__name__, sys.modules.get(package.__name__, package))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)


def error_of(layer: Layer, weight: Weight, M: int = 3) -> float:
    x = activations(M, weight.case.K)
    out = layer.give(layer.run(layer.take(x)))
    return relative_error(out, x.double() @ (weight.dense if layer.dense is None else layer.dense).double())


@pytest.mark.parametrize(
    ("name", "package"),
    [(peer.name, peer.packages[0].removesuffix("-kernels")) for peer in CUDA_PEERS if peer.packages != ("torch",)],
)
def test_a_peer_without_its_package_says_which(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        PEERS[name].prepare(Weight(Case(256, 64)), 1)


def test_tinygemm_is_not_on_a_cpu_and_has_a_format_of_its_own() -> None:
    with pytest.raises(NotImplementedError, match="_convert_weight_to_int4pack"):
        TINYGEMM.prepare(Weight(Case(256, 64)), 1)
    with pytest.raises(Unsupported, match="takes 4 bits; this weight has 8"):
        TINYGEMM.prepare(Weight(Case(256, 64, bits=8)), 1)
    with pytest.raises(Unsupported, match="has no activation order"):
        TINYGEMM.prepare(Weight(Case(256, 64, act_order=True)), 1)
    with pytest.raises(Unsupported, match="multiples of 32 and N of 8; this weight has K=48"):
        TINYGEMM.prepare(Weight(Case(48, 64, group_size=16)), 1)


@pytest.mark.parametrize("K", [256, 320, 352])
def test_tinygemm_takes_what_torch_checks(K: int) -> None:
    weight = Weight(Case(K, 64, group_size=32))
    forms = {"q": weight.q, "zeros": weight.zeros, "scales": weight.scales}
    with FakeTensorMode() as mode:  # a CPU's, for which torch has the same checks
        fakes = {name: mode.from_tensor(form) for name, form in forms.items()}
        layer = TINYGEMM.prepare(SimpleNamespace(case=weight.case, **fakes), 1)
        out = layer.run(layer.take(torch.empty(3, K, dtype=torch.float16)))
    assert (out.shape, out.dtype) == ((3, 64), torch.bfloat16)
    assert layer.nbytes == K * 64 // 2 + K // 32 * 64 * 4


class TinygemmOnTheHost(TorchDispatchMode):
    """The two ops of aten/src/ATen/native/cuda/int4mm.cu, without the order that it packs into."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._convert_weight_to_int4pack.default:
            return args[0]
        if func is torch.ops.aten._weight_int4pack_mm.default:
            x, packed, group_size, scales_and_zeros = args
            q = torch.stack([packed >> 4, packed & 15], 2).flatten(1).t().float()
            scales, zeros = scales_and_zeros.float().repeat_interleave(group_size, 0).unbind(2)
            return (x.float() @ ((q - 8) * scales + zeros)).bfloat16()
        return func(*args, **(kwargs or {}))


def test_tinygemm_has_the_first_of_two_values_in_the_higher_bits_and_zero_in_the_middle() -> None:
    weight = Weight(Case(256, 64))
    with TinygemmOnTheHost():
        assert error_of(TINYGEMM.prepare(weight, 1), weight) < 8 * TOLERANCE  # bfloat16


def test_vllm_gptq_gemm_gets_shuffled_words_and_zero_points_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffle(q_weight: Tensor, bit: int) -> None:
        torch.ops.exllama.gptq_shuffle(q_weight, torch.empty(0, dtype=torch.int32), bit)

    def gemm(
        a: Tensor,
        b_q_weight: Tensor,
        b_gptq_qzeros: Tensor,
        b_gptq_scales: Tensor,
        use_exllama: bool,
        use_v2_format: bool,
        bit: int,
    ) -> Tensor:
        weight = (b_q_weight, b_gptq_qzeros, b_gptq_scales, torch.empty(0, dtype=torch.int32))
        return exllama_ops.gptq_gemm(a, *weight, use_exllama, bit, use_v2_format=use_v2_format)

    modules_of(monkeypatch, "vllm._custom_ops", gptq_shuffle=shuffle, gptq_gemm=gemm)
    for bits in SUPPORTED_BITS:
        weight = Weight(Case(256, 64, bits=bits))
        before = weight.checkpoint.qweight.clone()
        layer = PEERS["vLLM gptq_gemm fp16"].prepare(weight, 1)
        assert error_of(layer, weight) < TOLERANCE
        assert torch.equal(weight.checkpoint.qweight, before)


def marlin(
    *,
    a: Tensor,
    c: None,
    b_q_weight: Tensor,
    b_bias: None,
    b_scales: Tensor,
    a_scales: None,
    global_scale: None,
    b_zeros: Tensor | None,
    workspace: Tensor,
    b_q_type: str,
    size_m: int,
    size_n: int,
    size_k: int,
    use_fp32_reduce: bool,
) -> Tensor:
    """``x @ W`` with what the stand-ins below leave as it was."""
    bits = {"uint4": 4, "uint8b128": 8}[b_q_type]
    zeros = b_zeros.repeat_interleave(128, 0) if b_zeros is not None else 1 << (bits - 1)
    W = (unpack_rows(b_q_weight, bits) - zeros) * b_scales.float().repeat_interleave(128, 0)
    assert (size_m, size_k, size_n) == (a.shape[0], *W.shape)
    return (a.float() @ W).half()


@pytest.mark.parametrize("bits", [4, 8])
def test_vllm_marlin_has_zero_points_for_four_bits_alone(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
        assert (size_k * num_bits // 32, size_n) == b_q_weight.shape
        return b_q_weight

    def same(part: Tensor, **sizes: int) -> Tensor:
        assert (sizes["size_k"], sizes["size_n"]) in ((256, 64), part.shape)
        return part

    utils = {
        "marlin_permute_scales": same,
        "marlin_zero_points": same,
        "marlin_make_workspace_new": lambda device: torch.zeros(1, dtype=torch.int32, device=device),
    }
    modules_of(monkeypatch, "vllm._custom_ops", gptq_marlin_repack=repack, marlin_gemm=marlin)
    modules_of(monkeypatch, "vllm.scalar_type", scalar_types=SimpleNamespace(uint4="uint4", uint8b128="uint8b128"))
    modules_of(monkeypatch, "vllm.model_executor.layers.quantization.utils.marlin_utils", **utils)
    weight = Weight(Case(256, 64, bits=bits))
    layer = PEERS["vLLM Marlin fp16"].prepare(weight, 1)
    assert error_of(layer, weight) < TOLERANCE
    assert (layer.dense is None) == (bits == 4)
    assert layer.nbytes == 256 * 64 * bits // 8 + 2 * 64 * 2 + (2 * 64 * 4 if bits == 4 else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_vllm_machete_gets_contiguous_columns_and_zeros_times_scales(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepack(b_q_weight: Tensor, a_type: torch.dtype, b_type: int, group_scales_type: torch.dtype) -> Tensor:
        assert b_q_weight.stride(0) == 1
        assert (a_type, b_type, group_scales_type) == (torch.float16, bits, torch.float16)
        return b_q_weight.contiguous()

    def machete(
        a: Tensor, b_q: Tensor, b_type: int, b_group_scales: Tensor, b_group_zeros: Tensor, b_group_size: int
    ) -> Tensor:
        scales, zeros = (part.float().repeat_interleave(b_group_size, 0) for part in (b_group_scales, b_group_zeros))
        return (a.float() @ (unpack_rows(b_q, b_type) * scales + zeros)).half()

    modules_of(monkeypatch, "vllm._custom_ops", machete_prepack_B=prepack, machete_mm=machete)
    modules_of(monkeypatch, "vllm.scalar_type", scalar_types=SimpleNamespace(uint4=4, uint8=8))
    weight = Weight(Case(256, 64, bits=bits))
    layer = PEERS["vLLM Machete fp16"].prepare(weight, 1)
    assert error_of(layer, weight) < 2 * TOLERANCE  # the zeros are rounded
    assert layer.nbytes == 256 * 64 * bits // 8 + 2 * 64 * 4


def test_humming_gets_the_tensors_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class HummingLayer(nn.Module):
        def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
            super().__init__()
            self.bits, self.group_size = weight_config["bits"], weight_config["group_size"]
            assert (weight_config["quant_method"], weight_config["sym"], torch_dtype) == ("gptq", False, torch.float16)
            self.shape = shape_k, shape_n
            self.is_ready = False

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            assert tensors["g_idx"].shape == self.shape[:1]
            for name in ("qweight", "qzeros", "scales"):
                setattr(self, name, nn.Parameter(tensors[name].clone(), requires_grad=False))

        def transform(self) -> None:
            self.is_ready = True

        def forward(self, x: Tensor) -> Tensor:
            assert self.is_ready
            zeros = unpack_columns(self.qzeros, self.bits).repeat_interleave(self.group_size, 0)
            scales = self.scales.float().repeat_interleave(self.group_size, 0)
            return (x.float() @ ((unpack_rows(self.qweight, self.bits) - zeros) * scales)).half()

    modules_of(monkeypatch, "humming.layer", HummingLayer=HummingLayer)
    for bits in SUPPORTED_BITS:
        weight = Weight(Case(256, 64, bits=bits))
        layer = PEERS["humming fp16"].prepare(weight, 1)
        assert error_of(layer, weight) < TOLERANCE
        assert layer.nbytes == weight.nbytes


def stand_in(is_symmetric: bool) -> Callable[..., nn.Module]:
    """A layer class of GPTQModel: buffers of a checkpoint, and a product."""

    class Linear(nn.Module):
        def __init__(self, bits: int, group_size: int, in_features: int, out_features: int, **options: Any) -> None:
            super().__init__()
            assert options["sym"] == is_symmetric
            self.bits, groups = bits, in_features // group_size
            self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(groups, out_features, dtype=options["dtype"]))
            self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
            self.is_ready = False

        def post_init(self) -> None:
            self.is_ready = True

        def forward(self, x: Tensor) -> Tensor:
            assert self.is_ready
            assert not self.training
            zeros = 1 << (self.bits - 1) if is_symmetric else unpack_columns(self.qzeros, self.bits)[self.g_idx]
            W = (unpack_rows(self.qweight, self.bits) - zeros) * self.scales.float()[self.g_idx]
            return (x.float() @ W).half()

    return Linear


@pytest.mark.parametrize("act_order", [False, True])
def test_layers_of_gptqmodel_get_the_checkpoint(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "gptqmodel.nn_modules.qlinear"
    modules_of(monkeypatch, f"{folder}.tritonv2", TritonV2Linear=stand_in(is_symmetric=False))
    modules_of(monkeypatch, f"{folder}.marlin", MarlinLinear=stand_in(is_symmetric=True))
    weight = Weight(Case(256, 64, act_order=act_order))
    for name in ("Triton", "Marlin"):
        assert error_of(PEERS[f"GPTQModel {name} fp16"].prepare(weight, 1), weight) < TOLERANCE
    with pytest.raises(Unsupported, match="takes 2, 4, 8 bits"):
        PEERS["GPTQModel Triton fp16"].prepare(Weight(Case(256, 64, bits=3)), 1)


def test_exllama_v2_of_gptqmodel_keeps_its_scratch_space(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(stand_in(is_symmetric=False)):  # type: ignore[misc]
        def scratch_space_fixed(self) -> int:
            return 1024

        def post_init(self, scratch_space: Any) -> None:
            assert scratch_space is self.scratch_space
            assert (scratch_space.nbytes, scratch_space.place) == (1024, self.qweight.device)
            super().post_init()

    modules_of(monkeypatch, "gptqmodel.nn_modules.qlinear.exllamav2", ExllamaV2Linear=Linear)
    space = lambda nbytes, place: SimpleNamespace(nbytes=nbytes, place=place)  # noqa: E731
    modules_of(monkeypatch, "gptqmodel.utils.exllamav2", ScratchSpace=space)
    weight = Weight(Case(256, 64))
    assert error_of(PEERS["GPTQModel ExLlama V2 fp16"].prepare(weight, 1), weight) < TOLERANCE


def test_gemlite_gets_a_row_of_values_for_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear:
        def __init__(self, W_nbits: int, group_size: int, in_features: int, out_features: int, **dtypes: str) -> None:
            assert set(dtypes.values()) == {"fp16"}
            self.shape = out_features, in_features // group_size, group_size

        def pack(self, W_q: Tensor, scales: Tensor, zeros: Tensor) -> None:
            assert W_q.dtype == torch.uint8
            self.W_q, self.scales, self.zeros = W_q, scales, zeros

        def __call__(self, x: Tensor) -> Tensor:
            q = self.W_q.float().view(self.shape)
            W = (q - self.zeros.float().unsqueeze(2)) * self.scales.float().unsqueeze(2)
            return (x.float() @ W.flatten(1).t()).half()

    modules_of(monkeypatch, "gemlite", GemLiteLinear=Linear, DType=SimpleNamespace(FP16="fp16"))
    for bits in (2, 4, 8):
        weight = Weight(Case(256, 64, bits=bits))
        assert error_of(PEERS["gemlite fp16"].prepare(weight, 1), weight) < TOLERANCE
