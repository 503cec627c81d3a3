"""What may be wrong with the arguments of a call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from properties.arguments import Arguments, put_side_by_side, right_arguments
from properties.calls import Call

# Changes the arguments of a call, the one of a name where its kind leaves a choice.
FaultOf = Callable[[Arguments, Call, str, random.Random], None]
# A permutation with duplicates has a meaning for these ops.
GATHERS = ("gptq_gemm", "gptq_gemm_multi")


def arguments(call: Call) -> Arguments:
    """New arguments for a call, the same ones every time, with its faults."""
    choose = random.Random(call.seed)
    made = right_arguments(call, choose)
    for kind, fault_of in _FAULTS.items():
        for fault in call.faults:
            if fault.kind == kind:
                fault_of(made, call, fault.argument, choose)
    made.remember()
    return made


def _entry(made: Arguments, name: str, choose: random.Random) -> tuple[int | None, Any]:
    """An argument, or of a list an index and what is there."""
    value = made.by_name[name]
    if not isinstance(value, list) or not value:
        return None, value
    index = choose.randrange(len(value))
    return index, value[index]


def _none(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
    # Torch itself refuses None in a list, and a call that has no tensor.
    if isinstance(made.by_name[name], Tensor) and len(made.tensors()) > 1:
        made.by_name[name] = None
        made.must_be_refused = True


def _another(change: Callable[[Tensor, random.Random], Tensor], is_wrong: Callable[[Tensor], bool]) -> FaultOf:
    """Another tensor in the place of one; ``is_wrong`` says whether it must be refused."""

    def fault(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
        index, tensor = _entry(made, name, choose)
        if isinstance(tensor, Tensor):
            changed = change(tensor, choose)
            made.put(name, index, changed)
            made.must_be_refused |= is_wrong(changed)

    return fault


def _of_another_dtype(tensor: Tensor, choose: random.Random) -> Tensor:
    others = [torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    others += [torch.uint32, torch.float32] if tensor.dtype == torch.int32 else [torch.int32]
    return torch.zeros(tensor.shape, dtype=choose.choice(others))


def _on_another_device(tensor: Tensor, choose: random.Random) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _of_another_rank(tensor: Tensor, choose: random.Random) -> Tensor:
    options = [tensor[None], tensor[..., None], torch.zeros((), dtype=tensor.dtype)]
    return choose.choice([*options, tensor.flatten()] if tensor.dim() > 1 else options)


def _of_another_size(tensor: Tensor, choose: random.Random) -> Tensor:
    if not tensor.dim():
        return tensor
    shape = list(tensor.shape)
    at = choose.randrange(tensor.dim())
    shape[at] = choose.choice((0, 1, max(0, shape[at] - 1), shape[at] + 1, 2 * shape[at]))
    changed = torch.zeros(shape, dtype=tensor.dtype)
    common = tuple(slice(min(sizes)) for sizes in zip(shape, tensor.shape, strict=True))
    changed[common] = tensor[common]
    return changed


def _of_other_strides(tensor: Tensor, choose: random.Random) -> Tensor:
    if not tensor.numel() or not tensor.dim():
        return tensor
    tensor = tensor.resolve_neg()  # which torch does before a call, with strides of its own
    options = [tensor[..., :1].expand(tensor.shape), torch.stack([tensor, tensor], -1)[..., 0]]
    if tensor.dim() == 2:
        transposed, wider = tensor.t().contiguous().t(), torch.cat([tensor, tensor], 1)
        options += [transposed, wider[:, : tensor.shape[1]], tensor[:1].expand(tensor.shape)]
    return choose.choice(options)


def _option(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
    if "group_size" in made.by_name and choose.random() < 0.5:
        size = made.by_name["group_size"] = choose.choice((-1, -128, 0, 1, call.groups, 2**31, 2**62))
        made.must_be_refused |= size < 0
    else:
        made.by_name["bit"] = choose.choice((-4, 0, 1, 5, 6, 7, 16, 32, 2**31, 2**32 + 4, 2**62))
        made.must_be_refused = True


def _lists(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
    """Lists of other lengths, or empty ones."""
    names = ("qweight", "qzeros", "scales")
    if choose.random() < 0.3:
        made.by_name.update({name: [] for name in names})
    else:
        name = choose.choice(names)
        tensors = made.by_name[name]
        made.by_name[name] = tensors[:-1] if choose.random() < 0.5 else [*tensors, *tensors[-1:]]
    made.must_be_refused = True


def _is_order(order: Any) -> bool:
    """Whether it is one that an op would read."""
    return isinstance(order, Tensor) and order.dim() == 1 and order.dtype == torch.int32 and not order.is_meta


def _in_the_order(change: Callable[[Tensor, Call, random.Random], bool]) -> FaultOf:
    """Other values in g_idx or q_perm; ``change`` says whether they must be refused."""

    def fault(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
        order = made.by_name[made.order_name]
        if _is_order(order) and order.numel() > 1 and order.is_contiguous():
            made.must_be_refused |= change(order, call, choose)

    return fault


def _out_of_range(order: Tensor, call: Call, choose: random.Random) -> bool:
    limit = call.groups if call.is_raw else call.K
    none = -2 if call.order == "filled" else -1  # where -1 is in range
    for _ in range(choose.choice((1, 1, 3))):
        order[choose.randrange(len(order))] = choose.choice((none, limit, limit + 7, 2**31 - 1, -(2**31)))
    return True


def _duplicate(order: Tensor, call: Call, choose: random.Random) -> bool:
    source, target = choose.sample(range(len(order)), 2)
    before, after = order[target].item(), order[source].item()
    order[target] = after
    if call.order == "filled":  # whose two lists agree in one way alone
        return before != after
    return call.shuffled and call.op not in GATHERS


def _overlap(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
    """The order of rows in the memory that gptq_shuffle writes."""
    qweight, q_perm = made.by_name["qweight"], made.by_name["q_perm"]
    if not _is_order(q_perm) or not isinstance(qweight, Tensor) or qweight.dtype != torch.int32 or qweight.is_meta:
        return
    fewer = min(qweight.numel(), q_perm.numel())
    put_side_by_side(made, choose, overlap=choose.choice((min(1, fewer), fewer)))
    made.must_be_refused |= fewer > 0


def _without_memory(fraction: float) -> FaultOf:
    """Memory taken away from a tensor: all of it, or its end."""

    def fault(made: Arguments, call: Call, name: str, choose: random.Random) -> None:
        _, tensor = _entry(made, name, choose)
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel() or not tensor.is_contiguous():
            return
        storage = tensor.untyped_storage()
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        # A lazy copy or a negated view has other memory once it is read.
        if storage.nbytes() < end or tensor.is_neg() or torch._C._is_cow_tensor(tensor):
            return
        storage.resize_(int((end - tensor.element_size()) * fraction))
        made.must_be_refused = True

    return fault


# In the order in which they are made: what follows a fault reads what it leaves.
_FAULTS: dict[str, FaultOf] = {
    "none": _none,
    "dtype": _another(_of_another_dtype, lambda tensor: True),
    "rank": _another(_of_another_rank, lambda tensor: True),
    "size": _another(_of_another_size, lambda tensor: False),
    "strides": _another(_of_other_strides, lambda tensor: not tensor.is_contiguous()),
    "device": _another(_on_another_device, lambda tensor: True),
    "option": _option,
    "lists": _lists,
    "range": _in_the_order(_out_of_range),
    "duplicate": _in_the_order(_duplicate),
    "overlap": _overlap,
    "freed": _without_memory(0.0),
    "shrunk": _without_memory(1.0),
}
