"""The choice of a tile by timing. `exllama_ops.warmup` alone asks for it: no call of an op times anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton.arguments import without_order
from exllama_ops.backends.triton.gemm import compute, in_order_of_rows, without_filling
from exllama_ops.backends.triton.gemm_dx import compute_dx
from exllama_ops.backends.triton.launch import is_capturing
from exllama_ops.backends.triton.tiles import DxPlan, Plan, Tile, device_of, plan_dx, plan_gemm
from exllama_ops.backends.triton.tuned_tiles import Problem, candidates, choices_of, keep
from exllama_ops.layout.weight import Weight

# What a device may have too little of for a tile, said by its driver or by a compiler.
_UNFIT = (OutOfResources, PTXASError, CompileTimeAssertionFailure)


def time_ms(run: Callable[[], object]) -> float:
    """The median time on the device, by events, with the weight out of the L2 cache before each run."""
    return float(do_bench(run, return_mode="median"))


def tune_gemm(x: Tensor, weight: Weight) -> None:
    """Have the fastest tile serve this gptq_gemm and those that share its plan, unless one was chosen before.

    The arguments are those of a call that was made before, M > 0.

    Raises:
        RuntimeError: a CUDA graph is being captured, or the call is traced: nothing can be timed; or no tile fits.
    """
    _refuse_unless_timeable(x)
    x, (weight,) = without_filling(x, [weight])
    plan = plan_gemm(x.shape[0], weight, x.dtype, device_of(x.device), is_batch_invariant())
    prepared = in_order_of_rows(x, plan, weight)
    _tune(plan, x, weight, lambda tile: compute(tile, [plan], prepared, [weight]))


def tune_gemm_dx(grad: Tensor, weight: Weight) -> None:
    """Do what `tune_gemm` does for a gptq_gemm_dx."""
    _refuse_unless_timeable(grad)
    if weight.is_filled:
        weight = without_order(weight)
    plan = plan_dx(weight.bits, device_of(grad.device))
    _tune(plan, grad, weight, lambda tile: compute_dx(replace(plan, tile=tile), grad, weight))


def _refuse_unless_timeable(x: Tensor) -> None:
    if is_capturing(x.device):
        raise RuntimeError("exllama_ops: kernels cannot be tuned while a CUDA graph is being captured")
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or _get_current_dispatch_mode() is not None:
        raise RuntimeError("exllama_ops: kernels cannot be tuned in a traced call")


def _tune(plan: Plan | DxPlan, x: Tensor, weight: Weight, run: Callable[[Tile], object]) -> None:
    problem = Problem.of(plan, x.shape[0], weight)
    if problem in choices_of(x.device):
        return
    times: dict[Tile, float] = {}
    errors: dict[Tile, str] = {}
    for tile in candidates(plan.form, device_of(x.device).arch, plan.tile):
        try:
            times[tile] = time_ms(functools.partial(run, tile))
        except _UNFIT as error:
            errors[tile] = str(error)
    if not times:
        raise RuntimeError(f"exllama_ops: no tile of {problem} can be timed: {errors}")
    keep(x.device, problem, min(times, key=times.__getitem__))
