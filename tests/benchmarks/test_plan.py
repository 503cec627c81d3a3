"""From a weight to measurements, on a small weight and with peers made for the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import exllama_ops
from benchmarks import isa
from benchmarks.cases import Case, Weight, activations
from benchmarks.conformance import ConformanceError, Gate, relative_error
from benchmarks.devices import cpu
from benchmarks.devices.cpu import Cpu
from benchmarks.peers import PEERS, exllama
from benchmarks.peers.peer import Layer, Peer
from benchmarks.plan import Budget, Plan
from benchmarks.run import main

CASES = (Case(256, 128), Case(256, 128, act_order=True), Case(256, 64, bits=3, group_size=32))
DENSE = [peer for peer in PEERS if peer.name == "torch dense fp32"]
ONCE = Budget(seconds=0.0, rounds=1)
LIMITS = {"dram": 1e10, "float": 1e11, "int16": 1e11, "int8": 1e11}


# Of copies: the real number, for weights as small as these, would be thousands.
ROTATION_BYTES = 1 << 18


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.ROTATION_BYTES", ROTATION_BYTES)


@pytest.fixture(autouse=True)
def settings_that_stay() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), exllama_ops.get_cpu_matmul_precision()
    yield
    torch.set_num_threads(threads)
    exllama_ops.set_cpu_matmul_precision(precision)


def plan(peers: list[Peer], lines: list[str] | None = None, held: str = "native", case: Case = CASES[0]) -> Plan:
    said = [] if lines is None else lines
    return Plan(case, (1, 64), peers, device=Cpu(1, held), say=said.append)


def broken(weight: Weight, threads: int) -> Layer:
    raise ImportError("No module named 'fast'")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_is_measured_for_every_number_of_tokens(case: Case) -> None:
    measured = plan(DENSE, case=case)
    found = list(measured.measurements(lambda: LIMITS, ONCE))
    assert [(m.op, m.M) for m in found] == [("gptq_gemm", 1), ("gptq_gemm", 64), ("gptq_gemm_dx", 64)]
    assert not measured.missing
    names = {"exllama_ops highest", "exllama_ops high", "exllama_ops medium", "torch dense fp32"}
    for measurement in found[:2]:
        errors = {kernel.name: kernel.error for kernel in measurement.kernels}
        assert set(errors) == names
        assert errors["torch dense fp32"] < 1e-6
        assert errors["exllama_ops high"] < 1e-3 < errors["exllama_ops medium"] < 2e-2


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exllama.gemm

    def wrong(weight: Weight, precision: str, dtype: torch.dtype) -> Layer:
        layer = right(weight, precision, dtype)
        return Layer(layer.take, lambda x: layer.run(x) + (0.5 if x.shape[0] > 1 else 0.0), layer.give, layer.nbytes)

    monkeypatch.setattr(exllama, "gemm", wrong)
    measurements = plan(DENSE).measurements(lambda: LIMITS, ONCE)
    assert next(measurements).M == 1
    with pytest.raises(ConformanceError, match=r"gptq_gemm, highest: \d+ of 8192 elements lie beyond the bound"):
        next(measurements)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gate_refuses_one_wrong_element_and_nan(case: Case) -> None:
    weight = Weight(case)
    x, grad = activations(8, case.K), activations(8, case.N, seed=2)
    gate = Gate(weight, x, grad)
    for precision in exllama.PRECISIONS:
        layer = exllama.gemm(weight, precision)
        layer.enter()
        out = layer.run(x)
        gate.check(out, precision)
        gate.check(out[:3], precision)
        for fault in (float(out.abs().max()), float("nan")):
            bad = out.clone()
            bad[7, 5] += fault
            with pytest.raises(ConformanceError, match=r"1 of .* the first at \(7, 5\)"):
                gate.check(bad, precision)
    dx = exllama.gemm_dx(weight).run(grad)
    gate.check_dx(dx)
    dx[0, 0] *= 1.01
    with pytest.raises(ConformanceError, match="gptq_gemm_dx: 1 of"):
        gate.check_dx(dx)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bounds_are_those_of_the_formulas_block_by_block(case: Case) -> None:
    weight = Weight(case)
    x = activations(2, case.K)
    x[1, 3] = 300.0  # an outlier of its block
    gate = Gate(weight, x)
    g_idx = weight.checkpoint.g_idx
    groups = torch.arange(case.K) // case.group_size if g_idx is None else g_idx
    for row, column in ((0, 0), (1, 7)):
        high = medium = 0.0
        for group in range(case.K // case.group_size):
            rows = groups == group
            x_b, w_b = x[row, rows].double().abs(), weight.dense[rows, column].double().abs()
            has_outlier = x_b.max() > 16 * x_b.mean()
            by_elements = x_b @ w_b + 2.0**-18 * x_b.max() * w_b.sum()
            high += 2.0**-11 * float(by_elements if has_outlier else x_b.norm() * w_b.norm())
            medium += float(x_b.max() / 127 * w_b.sum())
        rounding = 2.0**-23 * float(x[row].double().abs() @ weight.dense[:, column].double().abs())
        assert float(gate.bounds["high"][row, column]) == pytest.approx(high, abs=rounding)
        assert float(gate.bounds["medium"][row, column]) == pytest.approx(medium, abs=case.K * rounding)


def test_the_bound_of_high_is_tighter_than_int8_activations() -> None:
    weight = Weight(CASES[0])
    x = activations(64, weight.case.K)
    layer = exllama.gemm(weight, "medium", torch.float32)
    layer.enter()
    with pytest.raises(ConformanceError, match="gptq_gemm, high"):
        Gate(weight, x).check(layer.run(x.float()), "high")


def test_a_peer_that_fails_is_named_with_its_error_and_the_others_run() -> None:
    def takes_one(weight: Weight, threads: int) -> Layer:
        def take(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 1:
                raise RuntimeError("one row\nonly")
            return x.float()

        return Layer(take, lambda x: x @ weight.dense, lambda out: out, weight.dense.nbytes)

    lines: list[str] = []
    peers = [Peer("broken", broken), Peer("single", takes_one), *DENSE]
    measured = plan(peers, lines)
    found = list(measured.measurements(lambda: LIMITS, ONCE))
    assert [(kernel.name, kernel.tokens, kernel.error) for kernel in measured.missing] == [
        ("broken", None, "ImportError: No module named 'fast'"),
        ("single", 64, "RuntimeError: one row only"),
    ]
    assert f"{CASES[0]}: broken is not measured: ImportError: No module named 'fast'" in lines
    assert found[0].find("single") is not None
    assert found[1].find("single") is None
    assert found[1].find("torch dense fp32") is not None


def test_a_peer_that_cannot_be_held_to_an_instruction_set_is_left_out() -> None:
    measured = plan([Peer("free", broken), *DENSE], held="avx2")
    assert [kernel.error for kernel in measured.missing] == ["Unsupported: cannot be held to avx2"]


def test_copies_of_a_weight_are_more_than_the_rotation() -> None:
    layers = plan([])._gemms[1].layers
    assert len({layer.nbytes for layer in layers}) == 1
    assert len(layers) * layers[0].nbytes >= ROTATION_BYTES


def test_relative_error_is_that_of_the_frobenius_norm() -> None:
    exact = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(exact + torch.tensor([[0.0, 0.3], [0.4, 0.0]]), exact) == pytest.approx(0.1)


def test_a_run_writes_table_record_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench draws the plot")
    monkeypatch.setattr(cpu, "Limits", lambda isa, threads: SimpleNamespace(measure=lambda: LIMITS))
    monkeypatch.setattr(isa, "hold_to_cores", lambda threads: None)
    options = ["--shapes", "256x128", "--M", "1", "64", "--seconds", "0", "--rounds", "1", "--peers", "fp32"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    stem = "4bit-g128-1thread"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["command"].startswith("python -m benchmarks.run --shapes 256x128")
    assert result["measurements"][0]["limits_per_s"]["dram"]["median"] == 1e10
    table = (tmp_path / f"{stem}.md").read_text()
    assert table.startswith(capsys.readouterr().out)
    assert "torch dense fp32" in table
    assert "<svg" in (tmp_path / f"{stem}.svg").read_text()


def test_a_variable_that_is_set_otherwise_is_refused() -> None:
    environment = {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    with pytest.raises(isa.HoldError, match="needs ONEDNN_MAX_CPU_ISA=AVX2; it is set to SSE41"):
        isa.hold_to("avx2", environment)
    environment = {}
    isa.hold_to("avx2", environment)
    assert environment["EXLLAMA_OPS_CPU_ISA"] == environment["ATEN_CPU_CAPABILITY"] == "avx2"
