"""An op without fake, reference, opcheck sample, gradient rule or kernel fails here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch._library.simple_registry import singleton

import exllama_ops
from exllama_ops import backends, ops, reference
from exllama_ops.layout import checks
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import Parts, Weight
from exllama_ops.ops import _library

PACKAGE = Path(__file__).parents[2] / "exllama_ops"
ALL = sorted(_library.schemas())
PUBLIC = [name for name in ALL if name == _library.op_of(name)]


def test_the_namespace_holds_eight_ops_and_five_overloads_without_autograd() -> None:
    assert ALL == [
        "gptq_dequantize",
        "gptq_gemm",
        "gptq_gemm.no_autograd",
        "gptq_gemm_dx",
        "gptq_gemm_dx.no_autograd",
        "gptq_gemm_multi",
        "gptq_gemm_multi.no_autograd",
        "gptq_moe_gemm",
        "gptq_moe_gemm.no_autograd",
        "gptq_moe_gemm_dx",
        "gptq_moe_gemm_dx.no_autograd",
        "gptq_shuffle",
        "gptq_unshuffle",
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_op_has_a_fake_a_sample_and_one_kernel_a_device(name: str) -> None:
    samples = (Path(__file__).parents[1] / "ops" / "sample.py").read_text()
    assert f'"{name}":' in samples
    qualified = f"exllama::{name}"
    assert singleton.find(qualified).fake_impl.kernel is not None
    for key in ("CPU", "CUDA", "XPU", "Autograd"):
        assert _library.kernel(name, key) is not None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has_kernel(qualified, "CompositeExplicitAutograd")
    assert not has_kernel(qualified, "CompositeImplicitAutograd")


@pytest.mark.parametrize("name", ALL)
def test_every_op_asks_inductor_for_the_traced_strides(name: str) -> None:
    tags = _library.overload(name).tags
    assert torch.Tag.needs_exact_strides in tags
    assert torch.Tag.pt2_compliant_tag in tags


@pytest.mark.parametrize("name", PUBLIC)
def test_op_public_function_and_reference_have_the_same_arguments(name: str) -> None:
    schema = [
        (argument.name, argument.default_value if argument.has_default_value() else inspect.Parameter.empty)
        for argument in getattr(torch.ops.exllama, name).default._schema.arguments
    ]
    for function in (getattr(ops, name), getattr(reference, name), getattr(exllama_ops, name)):
        parameters = inspect.signature(function).parameters.values()
        assert [(parameter.name, parameter.default) for parameter in parameters] == schema


@pytest.mark.parametrize("name", PUBLIC)
def test_an_op_and_its_check_have_the_same_arguments_with_the_weight_as_one(name: str) -> None:
    *first, last = inspect.signature(getattr(checks, f"check_{name}")).parameters
    kind = {"weight": Weight, "parts": Parts, "experts": Experts}.get(last)
    rest = [last] if kind is None else inspect.signature(kind.of).parameters
    assert [*first, *rest] == [argument.name for argument in _library.overload(name)._schema.arguments]


def test_the_arguments_of_an_op_are_spelt_out_in_ops_and_in_the_bridges_alone() -> None:
    """A function that takes `use_v2_format` beside more than zero points takes the eight arguments of a weight."""
    spelt_out = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [arg.arg for arg in node.args.args] if isinstance(node, ast.FunctionDef) else []
            if "use_v2_format" in names and names != ["qzeros", "bits", "use_v2_format"]:
                spelt_out.add(path.relative_to(PACKAGE).as_posix())
    ops_of_weights = {f"ops/{name}.py" for name in PUBLIC if "shuffle" not in name}
    # The last bridge has the arguments of another library's ops.
    bridges = {"layout/weight.py", "layout/experts.py", "integrations/vllm/signatures.py"}
    assert spelt_out == {*bridges, *ops_of_weights}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_op_and_reference_has_a_file_of_its_name(name: str) -> None:
    assert (PACKAGE / "ops" / f"{name}.py").is_file()
    assert (PACKAGE / "reference" / f"{name}.py").is_file()


def test_only_one_file_owns_a_torch_library() -> None:
    owners = [path.name for path in PACKAGE.rglob("*.py") if "torch.library.Library(" in path.read_text()]
    assert owners == ["_library.py"]


def test_a_second_kernel_for_an_op_and_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="already has a kernel for CPU"):
        _library.register_kernel("gptq_gemm", "CPU", lambda *args: None)


def test_report_names_the_backend_of_every_op_and_device() -> None:
    rows = {(choice.op, choice.dispatch_key): str(choice) for choice in backends.report()}
    assert set(rows) == {(op, key) for op in PUBLIC for key in ("CPU", "CUDA", "XPU")}
    cuda = ("CUDA gptq_gemm: cuda (", "CUDA gptq_gemm: triton (", "CUDA gptq_gemm: reference (not cuda: ")
    assert rows["gptq_gemm", "CUDA"].startswith(cuda)
    assert rows["gptq_gemm", "CPU"].startswith(("CPU gptq_gemm: cpu (", "CPU gptq_gemm: reference (not cpu: "))
