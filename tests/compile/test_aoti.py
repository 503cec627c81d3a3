"""AOTInductor packages of quantized models, run from Python and by a program without it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import HIDDEN, TOKENS, K
from torch import Tensor, nn

from exllama_ops import ExllamaExperts, ExllamaLinear, GptqWeight, freeze, quantize
from exllama_ops.backends.cpu import BACKEND
from exllama_ops.backends.native import cache
from exllama_ops.backends.native.compile import SCHEMA, find_compiler
from exllama_ops.compile import FuseSharedInput
from exllama_ops.ops import _library
from ptx_emulator.toolchain import WARNINGS

TORCH = Path(torch.__file__).parent

needs_compiler = pytest.mark.skipif(find_compiler(SCHEMA) is None, reason="needs a C++ compiler")


class GatedMLP(nn.Module):
    """gate and up share x and an order of rows, so the pass makes one product of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        g_idx = (torch.arange(K) // 32)[torch.randperm(K, generator=generator)]

        def linear(out_features: int, in_features: int, bits: int, **options: Tensor | None) -> ExllamaLinear:
            weight = torch.randn(out_features, in_features, generator=generator)
            return ExllamaLinear.from_weight(quantize(weight, bits, 32, **options))

        self.gate, self.up = linear(HIDDEN, K, 4, g_idx=g_idx), linear(HIDDEN, K, 4, g_idx=g_idx)
        self.down = linear(K, HIDDEN, 3, bias=torch.ones(K))

    def hidden(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


def package(model: nn.Module, example: Tensor, path: Path) -> Path:
    program = torch.export.export(model, (example,), dynamic_shapes=TOKENS)
    options = {"pre_grad_custom_pass": FuseSharedInput()}
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options))


def assert_close_to(model: GatedMLP, x: Tensor, result: Tensor) -> None:
    """Inductor's SiLU may differ from eager's by units in the last place, which the last product passes on."""
    eps = torch.finfo(torch.float32).eps
    bound = (5 * eps + 2 * (HIDDEN + 3) * eps) * (
        model.hidden(x).double().abs() @ model.down.dequantize().t().double().abs()
    )
    assert ((result.double() - model(x).double()).abs() <= bound + eps * (model(x).double().abs() + 1)).all()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[GatedMLP, Path]:
    model = GatedMLP()
    return model, package(model, torch.randn(4, K), tmp_path_factory.mktemp("aoti") / "mlp.pt2")


@pytest.fixture(scope="module")
def schema_library() -> Path:
    return cache.find_or_build(SCHEMA, print).path


@needs_compiler
def test_the_schema_library_defines_what_python_defines(schema_library: Path) -> None:
    """In a process of its own: a namespace has one owner."""
    ops = list(dict.fromkeys(_library.op_of(name) for name in sorted(_library.schemas())))
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(schema_library)!r})
library.exllama_define_ops.restype = ctypes.c_char_p
assert not torch._C._jit_get_schemas_for_operator("exllama::gptq_gemm")
assert library.exllama_define_ops() is None
for op in {ops!r}:
    print(*torch._C._jit_get_schemas_for_operator("exllama::" + op), sep="\\n")
assert library.exllama_define_ops() == b"the ops of the namespace exllama are defined already"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = [str(_library.overload(name)._schema) for name in sorted(_library.schemas())]
    assert result.stdout.splitlines() == expected
    source = (cache.csrc() or Path()) / "bindings" / "schema.cpp"
    assert source.read_text().count(") -> ") == len(expected)


@needs_compiler
def test_definitions_that_failed_are_taken_back_and_may_be_tried_again(schema_library: Path) -> None:
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(schema_library)!r})
library.exllama_define_ops.restype = ctypes.c_char_p
in_the_way = torch.library.Library("exllama", "FRAGMENT")
in_the_way.define("gptq_gemm_dx(Tensor x) -> Tensor")
assert library.exllama_define_ops()
assert not torch._C._jit_get_schemas_for_operator("exllama::gptq_gemm")
in_the_way._destroy()
assert library.exllama_define_ops() is None
assert torch._C._jit_get_schemas_for_operator("exllama::gptq_gemm")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_compiler
def test_a_package_holds_one_op_for_products_of_one_input(packaged: tuple[GatedMLP, Path]) -> None:
    """The overloads without autograd, by which the program asks for a kernel."""
    with zipfile.ZipFile(packaged[1]) as archive:
        (calls,) = (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".wrapper.json"))
    assert [node["node"]["target"] for node in calls["nodes"]] == [
        "exllama::gptq_gemm_multi.no_autograd",
        "exllama::gptq_gemm.no_autograd",
    ]


@needs_compiler
def test_a_packaged_mlp_runs_from_python_for_any_number_of_tokens(packaged: tuple[GatedMLP, Path]) -> None:
    model, path = packaged
    loaded = torch._inductor.aoti_load_package(str(path))
    for tokens in (2, 7, 65):
        x = torch.randn(tokens, K)
        assert_close_to(model, x, loaded(x))


@needs_compiler
def test_a_packaged_mlp_runs_in_a_program_without_python(
    tmp_path: Path, schema_library: Path, packaged: tuple[GatedMLP, Path]
) -> None:
    BACKEND.build()
    assert BACKEND.library is not None, BACKEND.failure
    model, path = packaged
    program = tmp_path / "program"
    include = [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    source = Path(__file__).with_name("aoti_program.cpp")
    link = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{TORCH / 'lib'}"]
    compiler = find_compiler(SCHEMA)
    assert compiler is not None
    command = [*compiler.command, "-std=c++20", *WARNINGS, *include, str(source), *link, "-o", str(program)]
    subprocess.run(command, check=True)
    x = torch.randn(7, K)
    x.numpy().tofile(tmp_path / "x")
    libraries = [str(schema_library), str(BACKEND.library.path)]
    sizes = [str(size) for size in x.shape]
    command = [str(program), *libraries, str(path), str(tmp_path / "x"), *sizes, str(tmp_path / "out")]
    subprocess.run(command, check=True, env={})
    result = torch.from_numpy(np.fromfile(tmp_path / "out", dtype=np.float32)).reshape(7, K)
    assert_close_to(model, x, result)


@needs_compiler
@pytest.mark.slow
def test_a_frozen_mlp_is_packaged(tmp_path: Path) -> None:
    model = GatedMLP()
    assert freeze(model, (torch.randn(4, K),)).fused == (("gate", "up"),)
    loaded = torch._inductor.aoti_load_package(str(package(model, torch.randn(4, K), tmp_path / "mlp.pt2")))
    for tokens in (2, 7):
        x = torch.randn(tokens, K)
        assert_close_to(model, x, loaded(x))


class Logits(nn.Module):
    """The forward of a transformers model without a cache: token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@needs_compiler
@pytest.mark.slow
@pytest.mark.demo
def test_the_packaged_demo_model_gives_the_logits_of_the_compiled_model(tmp_path: Path) -> None:
    """Bit by bit: it has Inductor's kernels of the same graph, and ours. How far the logits of compiled models are from
    exact ones is in tests/integrations/test_demo.py.
    """
    from exllama_ops import load_model
    from exllama_ops.integrations.demo import demo_checkpoint

    model = Logits(load_model(demo_checkpoint(), torch.float32)).eval()
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "demo.pt2"))
        result = torch._inductor.aoti_load_package(path)(ids)
        assert torch.equal(result, torch.compile(model, fullgraph=True)(ids))


@needs_compiler
def test_a_package_of_experts_serves_every_routing(tmp_path: Path) -> None:
    """`FuseSharedInput` leaves their products as they are."""

    def weights(inputs: int, outputs: int) -> list[GptqWeight]:
        return [quantize(torch.randn(outputs, inputs), 4, 32) for _ in range(4)]

    def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.rand(tokens, 4).topk(2)
        return torch.randn(tokens, 64), chosen.indices, chosen.values

    model = ExllamaExperts(weights(64, 32), weights(64, 32), weights(32, 64))
    program = torch.export.export(model, routed(3), dynamic_shapes=(TOKENS[0],) * 3)
    options = {"pre_grad_custom_pass": FuseSharedInput()}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "experts.pt2"), inductor_configs=options
    )
    with zipfile.ZipFile(path) as archive:
        (calls,) = (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".wrapper.json"))
    assert [node["node"]["target"] for node in calls["nodes"]] == ["exllama::gptq_moe_gemm.no_autograd"] * 3
    loaded = torch._inductor.aoti_load_package(path)
    for tokens in (2, 7, 65):
        inputs = routed(tokens)
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
