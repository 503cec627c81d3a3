"""The kernels against float64: each algorithm by every width, order of rows and dtype, and its bits by a second call.

The weights and the bounds are those of the tests. So are two parts of this step, which need processes of their own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.exllama_cuda import named, reasons_against_native
from conformance.weights import DTYPES, Case, Weight, build, build_experts, build_parts, experts_args, multi_args
from cuda.bounds import dx_error, gemm_error
from exllama_ops.layout.formats import SUPPORTED_BITS
from exllama_ops.testing.bounds import beyond_bound, error_bound, sum_bound
from tools.gpu_hour.part import Options, refuse_other_backends
from tools.gpu_hour.plan import ALGORITHMS
from tools.gpu_hour.records import Result, Table
from tools.gpu_hour.steps import tests

ORDERS = (("sorted", True), ("perm", True), ("filled", True), ("sorted", False), ("raw", False))
# Fewer rows than a tile has, a tile of every kernel and more than one.
TOKENS = (1, 7, 40, 300)
SMALL_TOKENS = (1, 40)
# The experts have three rows, none, and more than a tile of any kernel. Rows of no expert stand at both ends.
OFFSETS, ROWS = (1, 4, 4, 139), 141
_DRY_WIDTHS = (4,)
_TESTS = {
    "captures": ("test_first_launch.py", "test_traps.py"),
    "settings": ("test_settings.py", "test_devices.py", "test_triton.py"),
}


@dataclass
class Tally:
    """What was found of some products.

    Args:
        worst: the largest part of its bound that an error took, by the width and dtype.
    """

    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    worst: dict[tuple[int, str], float] = field(default_factory=dict)

    def note(self, what: str, bits: int, out: Tensor, again: Tensor, x: Tensor, W: Tensor, relative: float) -> None:
        """Compare a result (M, N) with ``x @ W``, and with that of a second call."""
        out, again = out.cpu(), again.cpu()
        exact = x.double() @ W
        beyond = beyond_bound(out, exact, sum_bound(x, W, relative))
        part = float(((out.double() - exact).abs() / error_bound(x, W, relative)).nan_to_num(torch.inf).max())
        key = bits, str(out.dtype).removeprefix("torch.")
        self.worst[key] = max(self.worst.get(key, 0.0), part)
        if beyond.any():
            self.wrong.append(
                f"{what}: {int(beyond.sum())} of {beyond.numel()} elements beyond the bound, by {part:.3g}"
            )
        elif not torch.equal(out, again):
            self.wrong.append(f"{what}: a second call has other bits")
        else:
            self.right += 1

    def note_bits(self, what: str, got: Tensor, expected: Tensor) -> None:
        """Compare what must have the same bits."""
        if torch.equal(got, expected):
            self.right += 1
        else:
            self.wrong.append(f"{what}: {int((got != expected).sum())} of {got.numel()} elements have other bits")


def run(what: str, options: Options) -> Result:
    """Check an algorithm, the other ops, or what takes a process of its own."""
    if what in _TESTS:
        return tests.run_files([f"tests/gpu/{name}" for name in _TESTS[what]], options)
    place = torch.device("cpu" if options.dry else "cuda")
    widths: Sequence[int] = _DRY_WIDTHS if options.dry else SUPPORTED_BITS
    tokens: Sequence[int] = SMALL_TOKENS if options.dry else TOKENS
    if not options.dry and (reasons := reasons_against_native()):
        return Result("failed", f"the native kernels do not serve: {'; '.join(reasons)}")
    ops = torch.ops.exllama
    tally = check_others(ops, place, widths) if what == "others" else check(ops, place, what, widths, tokens)
    not_walked = (
        ["CUDA kernels: the reference computes in their place; tests/cuda emulates them"] if options.dry else []
    )
    return result_of(tally, not_walked)


def main() -> int:
    """The small smoke test, in one process: what a sanitizer runs; returns the exit status."""
    refuse_other_backends()
    place, ops = torch.device("cuda"), torch.ops.exllama
    results = [result_of(check(ops, place, algorithm, SUPPORTED_BITS, SMALL_TOKENS)) for algorithm in ALGORITHMS]
    results.append(result_of(check_others(ops, place, SUPPORTED_BITS)))
    for name, result in zip((*ALGORITHMS, "others"), results, strict=True):
        print(name, result.status, result.summary, *result.lines, sep="\n  ")
    return 1 if any(result.status == "failed" for result in results) else 0


def result_of(tally: Tally, not_walked: list[str] | None = None) -> Result:
    """What people are told."""
    widths = sorted({bits for bits, _ in tally.worst})
    dtypes = list(dict.fromkeys(dtype for _, dtype in tally.worst))
    rows = [[f"{bits} bits", *(f"{tally.worst.get((bits, dtype), 0):.2f}" for dtype in dtypes)] for bits in widths]
    return Result(
        "failed" if tally.wrong or not tally.right else "passed",
        f"{tally.right} right, {len(tally.wrong)} wrong, {tally.refused} that it cannot compute",
        tally.wrong[:20],
        [Table("The largest error, as a part of its bound", ["width", *dtypes], rows)],
        not_walked=not_walked or [],
    )


def cases(bits: int) -> Iterator[Case]:
    """Weights of a width in every order of rows, with a partial tile of columns."""
    for order, shuffled in ORDERS:
        yield Case(bits, 544, 96, 32, order, shuffled, v2=shuffled)


def check(ops: Any, place: torch.device, algorithm: str, widths: Sequence[int], tokens: Sequence[int]) -> Tally:
    """Every product of an algorithm, by a weight and by experts.

    Args:
        ops: has gptq_gemm and gptq_moe_gemm.
        place: the device of its tensors.
        algorithm: its name in EXLLAMA_OPS_CUDA_ALGORITHM.
        widths: of the weights.
        tokens: rows of x.
    """
    tally = Tally()
    with named(algorithm):
        for case in itertools.chain.from_iterable(map(cases, widths)):
            weight = build(case)
            on_device, W = weight.to(str(place)), weight.dense
            for dtype, M in itertools.product(DTYPES, tokens):
                if algorithm not in _able(dtype):
                    tally.refused += 1
                    continue
                x = _random(M, case.K, dtype)
                call = _call(ops.gptq_gemm, x.to(place), on_device)
                try:
                    out = call()
                except ValueError as error:
                    if "cannot compute these arguments" not in str(error):
                        raise
                    tally.refused += 1
                    continue
                relative = gemm_error(algorithm, weight, dtype)
                tally.note(f"{algorithm} {case} {dtype} M={M}", case.bits, out, call(), x, W, relative)
            experts = build_experts(case, len(OFFSETS) - 1)
            for dtype in (dtype for dtype in DTYPES if algorithm in _able(dtype)):
                relative = max(gemm_error(algorithm, expert, dtype) for expert in experts)
                what = f"{algorithm} experts {case} {dtype}"
                _note_experts(tally, what, ops.gptq_moe_gemm, place, experts, _random(ROWS, case.K, dtype), relative)
    return tally


def check_others(ops: Any, place: torch.device, widths: Sequence[int]) -> Tally:
    """The other ops: dequantize and shuffle to the bit, the gradient and products of several parts to their bounds."""
    tally = Tally()
    for case in itertools.chain.from_iterable(map(cases, widths)):
        parts = build_parts(case, [case.N, 32])
        weight, on_device = parts[0], parts[0].to(str(place))
        dense = ops.gptq_dequantize(*on_device.args).cpu()
        tally.note_bits(f"dequantize {case}", dense, weight.dense.float().to(case.scales_dtype))
        if case.shuffled and case.order != "filled":
            _note_shuffles(tally, ops, on_device, case)
        for dtype in DTYPES:
            grad, x = _random(9, case.N, dtype), _random(9, case.K, dtype)
            dx = _call(ops.gptq_gemm_dx, grad.to(place), on_device)
            relative = max(dx_error(case.N, algorithm) for algorithm in ("tiled", "dense"))
            tally.note(f"dx {case} {dtype}", case.bits, dx(), dx(), grad, weight.dense.t(), relative)
            args = multi_args([part.to(str(place)) for part in parts])
            both, again = (ops.gptq_gemm_multi(x.to(place), *args) for _ in range(2))
            relative = max(gemm_error(algorithm, part, dtype) for algorithm in _able(dtype) for part in parts)
            W = torch.cat([part.dense for part in parts], 1)
            tally.note(f"multi {case} {dtype}", case.bits, both, again, x, W, relative)
            experts, grad = build_experts(case, len(OFFSETS) - 1), _random(ROWS, case.N, dtype)
            relative = dx_error(case.N, "tiled")
            what = f"dx of experts {case} {dtype}"
            _note_experts(tally, what, ops.gptq_moe_gemm_dx, place, experts, grad, relative, transposed=True)
    return tally


def _note_experts(
    tally: Tally,
    what: str,
    op: Callable[..., Tensor],
    place: torch.device,
    experts: Sequence[Weight],
    x: Tensor,
    relative: float,
    *,
    transposed: bool = False,
) -> None:
    """Compare the rows of each expert with their bound, and those of none with 0."""
    args = x.to(place), *experts_args([expert.to(str(place)) for expert in experts], OFFSETS)
    try:
        out, again = op(*args), op(*args)
    except ValueError as error:
        if "cannot compute these arguments" not in str(error):
            raise
        tally.refused += 1
        return
    outside = torch.cat([out[: OFFSETS[0]], out[OFFSETS[-1] :]])
    tally.note_bits(f"{what}, rows of none", outside, torch.zeros_like(outside))
    for i, (expert, (start, stop)) in enumerate(zip(experts, itertools.pairwise(OFFSETS), strict=True)):
        if start < stop:
            rows, W = slice(start, stop), expert.dense.t() if transposed else expert.dense
            tally.note(f"{what} expert {i}", expert.case.bits, out[rows], again[rows], x[rows], W, relative)


def _note_shuffles(tally: Tally, ops: Any, weight: Weight, case: Case) -> None:
    checkpoint = build(replace(case, shuffled=False)).qweight.to(weight.qweight.device)
    words = checkpoint.clone()
    ops.gptq_shuffle(words, weight.row_order, case.bits)
    tally.note_bits(f"shuffle {case}", words.cpu(), weight.qweight.cpu())
    back = ops.gptq_unshuffle(words, weight.row_order, case.bits)
    tally.note_bits(f"unshuffle {case}", back.cpu(), checkpoint.cpu())


def _able(dtype: torch.dtype) -> tuple[str, ...]:
    return ("scalar", "tiled") if dtype == torch.float32 else ALGORITHMS


def _call(op: Callable[..., Tensor], x: Tensor, weight: Weight) -> Callable[[], Tensor]:
    return lambda: op(x, *weight.args)


def _random(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


if __name__ == "__main__":
    sys.exit(main())
