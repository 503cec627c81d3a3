"""What ARCHITECTURE.md says of adding an op or a bit width, done: with every step, and with one step left out.

An op that is new in Python works by the reference, whatever native library is there. A width that one table lacks is
refused by name; tests/native/test_width_left_out.py says it of the tables of C++.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exllama_ops import ops, reference
from exllama_ops.backends import triton
from exllama_ops.backends.native import compile as compiling
from exllama_ops.backends.native.compile import CPU
from sandbox import CALL, MARK, ROOT, Sandbox

needs_compiler = pytest.mark.skipif(compiling.find_compiler(CPU) is None, reason="needs a C++ compiler")

# An op

OP_FILE = '''
"""gptq_negated: x times a quantized weight, negated."""

from exllama_ops.layout.checks import check_gptq_gemm
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.ops._linear import WEIGHT_ARGUMENTS, define_linear_op
import torch


def gptq_negated(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format=False, group_size=0):
    return _call(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Weight)
def fake_gptq_negated(x, weight):
    check_gptq_gemm(x, weight)
    return x.new_empty((x.shape[0], weight.N))


def _dx(grad, *weight):
    return -torch.ops.exllama.gptq_gemm_dx(grad, *weight)


_call = define_linear_op("gptq_negated", f"Tensor x, {WEIGHT_ARGUMENTS}", adjoint=_dx, fake=fake_gptq_negated)
'''

REFERENCE_FILE = """
from exllama_ops.layout.checks import check_gptq_gemm
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.reference.gptq_gemm import product


@from_op_arguments(Weight)
def gptq_negated(x, weight):
    check_gptq_gemm(x, weight)
    return -product(x, weight)
"""

# Asks the new op for its result, its schema and its fake, and prints who computes it.
CALL_NEW_OP = """
import torch, exllama_ops
from exllama_ops import reference
from exllama_ops.ops import gptq_negated
weight = exllama_ops.prepare(exllama_ops.quantize(torch.randn(32, 64), 4, 32)).weight
x = torch.randn(3, 64, requires_grad=True)
out = gptq_negated(x, *weight.arguments)
assert torch.equal(out, -reference.gptq_gemm(x.detach(), *weight.arguments))
checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the stub's gradient is not a number
for overload in (torch.ops.exllama.gptq_negated.default, torch.ops.exllama.gptq_negated.no_autograd):
    torch.library.opcheck(overload, (x.detach(), *weight.arguments), test_utils=checks)
for choice in exllama_ops.backends.report():
    if choice.dispatch_key == "CPU" and choice.op in ("gptq_negated", "gptq_unshuffle"):
        print(choice.op, choice.backend.name, choice.passed_over.get("cpu"), choice.passed_over.get("triton"), sep="; ")
print(exllama_ops.backends.report())
"""


def add_op(package: Path) -> None:
    """The steps of ARCHITECTURE.md for an op, in a copy of the package."""
    (package / "ops" / "gptq_negated.py").write_text(OP_FILE)
    (package / "reference" / "gptq_negated.py").write_text(REFERENCE_FILE)
    for folder in ("ops", "reference"):
        file = package / folder / "__init__.py"
        last = f"from exllama_ops.{folder}.gptq_gemm import gptq_gemm\n"
        text = file.read_text()
        assert last in text
        file.write_text(text.replace(last, f"{last}from exllama_ops.{folder}.gptq_negated import gptq_negated\n"))


LACKS = "its library has no gptq_negated, gptq_negated.no_autograd"


def check_new_op(out: str, err: str) -> None:
    new, old, *table = out.splitlines()
    # Triton is asked where the kernels may be interpreted, and has no kernel of the op either.
    assert new.startswith(f"gptq_negated; reference; ('{LACKS}',); ")
    assert old.startswith("gptq_unshuffle; cpu; None")
    assert err.count("ReferenceBackendWarning: exllama_ops runs its PyTorch reference for CPU tensors") == 1
    assert f"cpu ({LACKS})" in err
    (row,) = [line for line in table if re.match(r"CPU +gptq_negated ", line)]
    assert re.search(rf"gptq_negated +reference +not cpu: {LACKS}; not triton: ", row)


@pytest.fixture(scope="module")
def first_call(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sandbox, str, str]:
    """A copy of the package with the new op, and what the first process wrote that called it."""
    sandbox = Sandbox(tmp_path_factory.mktemp("op"))
    add_op(sandbox.root / "exllama_ops")
    return (sandbox, *sandbox.call(CALL_NEW_OP))


@needs_compiler
def test_a_new_op_works_by_the_reference_if_its_first_call_builds_the_library(
    first_call: tuple[Sandbox, str, str],
) -> None:
    sandbox, out, err = first_call
    assert "building the CPU kernels" in err
    assert len(sandbox.libraries()) == 1
    check_new_op(out, err)


@needs_compiler
def test_a_new_op_works_by_the_reference_beside_a_cached_library(first_call: tuple[Sandbox, str, str]) -> None:
    sandbox, *_ = first_call
    out, err = sandbox.call(CALL_NEW_OP)
    assert "building" not in err
    check_new_op(out, err)
    assert sandbox.call(CALL)[0].splitlines()[0] == str(MARK)  # the other ops are the library's


@needs_compiler
def test_a_new_op_works_by_the_reference_beside_a_library_from_a_wheel(
    first_call: tuple[Sandbox, str, str], tmp_path: Path
) -> None:
    sandbox, *_ = first_call
    package = tmp_path / "exllama_ops"
    shutil.copytree(sandbox.root / "exllama_ops", package)
    (package / "_native" / "cpu").mkdir(parents=True)
    shutil.copy(sandbox.libraries()[0], package / "_native" / "cpu")
    changes = {"PYTHONPATH": str(tmp_path), "EXLLAMA_OPS_CACHE": str(tmp_path / "cache")}
    not_the_sandbox = "import sys; sys.path.remove('')"
    status, out, err = sandbox.run("-c", not_the_sandbox + CALL_NEW_OP, **changes)
    assert status == 0, err
    assert "packaged library" in out
    check_new_op(out, err)


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton")
def test_a_new_op_is_passed_over_by_triton_with_a_reason(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    add_op(sandbox.root / "exllama_ops")
    out, _ = sandbox.call(CALL_NEW_OP, EXLLAMA_OPS_BACKEND="triton", TRITON_INTERPRET="1")
    new, old, *_ = out.splitlines()
    assert new.endswith("('it has no kernel of gptq_negated',)")
    assert old.startswith("gptq_unshuffle; triton; ")


@needs_compiler
def test_a_library_of_another_version_is_refused_and_the_package_imports(tmp_path: Path) -> None:
    """One that a wheel brought, which does not say its ops."""
    sandbox = Sandbox(tmp_path)
    packaged = sandbox.root / "exllama_ops" / "_native" / "cpu"
    packaged.mkdir(parents=True)
    (tmp_path / "old.c").write_text("const char* exllama_cpu_register(const char* a, const char* b) { return 0; }\n")
    compiler = compiling.find_compiler(CPU)
    assert compiler is not None
    command = [*compiler.command, "-x", "c", "-shared", "-fPIC", str(tmp_path / "old.c")]
    subprocess.run([*command, "-o", str(packaged / CPU.library)], check=True)
    out, err = sandbox.call()
    assert "CPU gptq_dequantize: reference (not cpu: its packaged library cannot be loaded: " in out
    assert "it is of another version of exllama_ops: " in out
    assert "undefined symbol: exllama_cpu_op_name" in out
    assert "ReferenceBackendWarning" in err


def test_the_names_of_triton_s_ops_are_those_of_its_module() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from exllama_ops.backends.triton import ops as triton_ops

    assert list(triton.OPS) == sorted(triton_ops.__all__)
    assert all(callable(getattr(triton_ops, name)) for name in triton.OPS)


@pytest.mark.parametrize("module", [ops, reference], ids=lambda module: module.__name__)
def test_a_file_of_an_op_is_not_forgotten(module: object) -> None:
    files = {path.stem for path in Path(module.__file__).parent.glob("gptq_*.py")}
    assert files == {name for name in module.__all__ if name.startswith("gptq_")}


# A bit width

WIDTH = 6
NAMES = ("gptq_shuffle", "gptq_unshuffle", "gptq_dequantize", "gptq_gemm", "gptq_gemm_dx", "gptq_gemm_multi")
OF_EXPERTS = ("gptq_moe_gemm", "gptq_moe_gemm_dx")

ARGUMENTS = f"""
import torch, exllama_ops

K, N, G, BITS = 64, 32, 2, {WIDTH}
none = torch.empty(0, dtype=torch.int32)
q, z = torch.randint(2**BITS, (K, N)), torch.randint(2**BITS, (G, N))
from exllama_ops.layout import pack_columns, pack_rows
qweight, qzeros, scales = pack_rows(q, BITS, "shuffled"), pack_columns(z, BITS), torch.rand(G, N)
options = (none, True, BITS, True)
weight = (qweight, qzeros, scales, *options)
experts = (*(tensor[None] for tensor in weight[:3]), none, torch.tensor([0, 3], dtype=torch.int32), *options[1:])
calls = dict(zip({NAMES + OF_EXPERTS}, (
    (qweight.clone(), none, BITS),
    (qweight, none, BITS),
    weight,
    (torch.randn(3, K), *weight),
    (torch.randn(3, N), *weight),
    (torch.randn(3, K), [qweight], [qzeros], [scales], *options),
    (torch.randn(3, K), *experts),
    (torch.randn(3, N), *experts),
), strict=True))
"""

REFUSALS = """
for name, args in calls.items():
    try:
        getattr(torch.ops.exllama, name)(*args)
        print(name, "computed")
    except (ValueError, NotImplementedError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def with_the_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, whose FORMATS have the width between others, and the sources of the libraries."""
    folder = tmp_path_factory.mktemp("width")
    ignore = shutil.ignore_patterns("__pycache__", "_native", "_csrc")
    shutil.copytree(ROOT / "exllama_ops", folder / "exllama_ops", ignore=ignore)
    (folder / "csrc").symlink_to(ROOT / "csrc")
    formats = folder / "exllama_ops" / "layout" / "formats.py"
    row, text = "    8: _format(8, ", formats.read_text()
    assert text.count(row) == 1
    formats.write_text(text.replace(row, f"    {WIDTH}: _format({WIDTH}, 16, lambda j, b: {WIDTH} * j + b),\n{row}"))
    return folder


def run(folder: Path, code: str, **environment: str) -> list[str]:
    """The lines that a program prints."""
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", ARGUMENTS + code]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_compiler
def test_the_native_library_refuses_a_width_that_only_python_has(with_the_width: Path) -> None:
    rule = f"bit must be one of (2, 3, 4, 8); got {WIDTH}"
    refused = [f"ValueError {name}: {rule}" for name in NAMES + OF_EXPERTS]
    assert run(with_the_width, REFUSALS) == refused


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton")
def test_triton_refuses_a_width_that_its_tables_lack(with_the_width: Path) -> None:
    lines = run(with_the_width, REFUSALS, EXLLAMA_OPS_BACKEND="triton", TRITON_INTERPRET="1")
    rule = (
        f"Triton's kernels have no tiles for {WIDTH} bits: backends/triton/tiles.py lacks that width in _GEMV_BLOCKS, "
        "DOT_ROWS, _FLOAT_DOT_ROWS"
    )
    assert lines == [f"NotImplementedError {name}: {rule}" for name in NAMES + OF_EXPERTS]


def test_the_reference_computes_with_any_width_of_formats(with_the_width: Path) -> None:
    code = """
W = scales.repeat_interleave(K // G, 0).double() * (q - z.repeat_interleave(K // G, 0)).double()
results = {name: getattr(torch.ops.exllama, name)(*args) for name, args in calls.items()}
torch.testing.assert_close(results["gptq_dequantize"].double(), W)
for name in ("gptq_gemm", "gptq_gemm_multi", "gptq_moe_gemm"):
    torch.testing.assert_close(results[name].double(), calls[name][0].double() @ W, rtol=1e-5, atol=1e-3)
for name in ("gptq_gemm_dx", "gptq_moe_gemm_dx"):
    torch.testing.assert_close(results[name].double(), calls[name][0].double() @ W.T, rtol=1e-5, atol=1e-3)
assert torch.equal(results["gptq_unshuffle"], pack_rows(q, BITS))
"""
    assert run(with_the_width, code, EXLLAMA_OPS_BACKEND="reference") == []


def test_onnx_takes_the_next_width_that_it_has(with_the_width: Path) -> None:
    code = """
from exllama_ops.compile import onnx
from exllama_ops.layout.weight import Weight
product = onnx._product(Weight.of(*weight))
assert product._attributes["bits"] == 8
assert torch.equal(product.B.reshape(N, K).t(), q.to(torch.uint8))
assert torch.equal(product.zeros.reshape(N, G).t(), z.to(torch.uint8))
"""
    assert run(with_the_width, code) == []


def test_what_reads_files_and_layers_names_the_width_that_it_lacks(with_the_width: Path) -> None:
    code = """
from exllama_ops.checkpoint import zeros
from exllama_ops.kernel import ExllamaLinearKernel, MPLinearLayerConfig, ScalarType
try:
    zeros.v1_to_v2(qzeros, BITS)
except NotImplementedError as error:
    print(error)
config = MPLinearLayerConfig((K, N), (K, N), ScalarType(BITS, 32), torch.float16, 32, False)
print(ExllamaLinearKernel.can_implement(config)[1].partition(";")[0])
"""
    assert run(with_the_width, code) == [
        f"v1 zero points of {WIDTH} bits have no rule in checkpoint/zeros.py",
        f"weight type uint{WIDTH}b32 is not supported",
    ]
