"""The arguments that a drawn call stands for, as they are before anything is wrong with them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from properties.calls import Call

PLACES = ("own memory", "inside a buffer", "odd strides", "lazily copied", "negated")


def bits_of(values: Tensor) -> Tensor:
    """Numbers as the integers of their bits."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@dataclass
class Arguments:
    """The arguments of a call by name, in their order, and the memory in which their tensors lie.

    Args:
        memory: whole, so that what lies around a tensor is seen too.
        must_be_refused: whether something is wrong with them for certain.
    """

    by_name: dict[str, Any]
    memory: list[Tensor] = field(default_factory=list)
    must_be_refused: bool = False
    _before: list[Tensor] = field(default_factory=list)

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(self.by_name.values())

    @property
    def order_name(self) -> str:
        """The name of the argument that gives the order of rows."""
        return "q_perm" if "q_perm" in self.by_name else "g_idx"

    def tensors(self) -> list[tuple[str, int | None, Tensor]]:
        """Every tensor with the name of its argument, and its index if that is a list."""
        found: list[tuple[str, int | None, Tensor]] = []
        for name, value in self.by_name.items():
            if isinstance(value, list):
                found += [(name, i, tensor) for i, tensor in enumerate(value)]
            elif isinstance(value, Tensor):
                found.append((name, None, value))
        return found

    def put(self, name: str, index: int | None, tensor: Tensor) -> None:
        """Another tensor in the place of one."""
        if index is None:
            self.by_name[name] = tensor
        else:
            self.by_name[name] = [*self.by_name[name][:index], tensor, *self.by_name[name][index + 1 :]]

    def remember(self) -> None:
        """Copy all memory that was not freed, for `changed`."""
        self.memory = [memory for memory in self.memory if memory.untyped_storage().nbytes() >= memory.nbytes]
        self._before = [memory.clone() for memory in self.memory]

    def changed(self) -> bool:
        """Whether any memory has other bits than `remember` saw."""
        pairs = zip(self.memory, self._before, strict=True)
        return not all(torch.equal(bits_of(memory), bits_of(before)) for memory, before in pairs)


def right_arguments(call: Call, choose: random.Random) -> Arguments:
    """New tensors for a call, the same ones every time, for arguments without a fault."""
    generator = torch.Generator().manual_seed(call.seed)
    K, G, bits = call.K, call.groups, call.bits

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    order = _order(call, generator)
    qweight = [words(K * bits // 32, N) for N in call.columns]
    if call.op in ("gptq_shuffle", "gptq_unshuffle"):
        made = Arguments({"qweight": qweight[0], "q_perm": order, "bit": bits})
    else:
        first: dict[str, Any] = {}
        if call.op == "gptq_gemm_dx":
            first = {"grad": _activations(call, call.columns[0], generator)}
        elif call.op != "gptq_dequantize":
            first = {"x": _activations(call, call.in_features, generator)}
        qzeros = [words(G, N * bits // 32) for N in call.columns]
        scales = [
            numbers(call.scale_values, (G, N), dtype, generator)
            for N, dtype in zip(call.columns, call.scales_dtypes, strict=True)
        ]
        weight: dict[str, Any] = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        if call.op != "gptq_gemm_multi":
            weight = {name: tensors[0] for name, tensors in weight.items()}
        options = {"use_exllama": call.shuffled, "bit": bits, "v2": call.v2, "group_size": call.group_size}
        made = Arguments({**first, **weight, "g_idx": order, **options})

    if call.shared and call.op == "gptq_shuffle":
        put_side_by_side(made, choose, overlap=0)
    elif call.shared:
        _put_into_one_another(made, choose)
    for name, index, tensor in made.tensors():
        place = choose.choice(PLACES) if call.placed and not call.shared else "own memory"
        view, memory = _placed(tensor, place, choose)
        made.put(name, index, view)
        made.memory.append(memory)
    return made


def _order(call: Call, generator: torch.Generator) -> Tensor:
    """g_idx or q_perm."""
    if call.order == "none":
        order = torch.empty(0)
    elif call.order == "identity":
        order = torch.arange(call.K)
    elif call.order == "permutation":
        order = torch.randperm(call.K, generator=generator)
    elif call.order == "filled":
        rows = torch.randperm(call.K, generator=generator)
        order = torch.cat([rows.where(rows < call.in_features, -1), rows.argsort()[: call.in_features]])
    else:
        order = torch.randint(0, call.groups, (call.K,), generator=generator)
        if call.order == "sorted":
            order = order.sort().values
        elif call.order == "one group":
            order = order[:1].repeat(call.K)
    return order.to(torch.int32)


def _activations(call: Call, width: int, generator: torch.Generator) -> Tensor:
    """x or grad, whose rows take the kinds of numbers in turn."""
    kinds = [numbers(kind, (call.M, width), call.dtype, generator) for kind in call.x_values]
    for i, values in enumerate(kinds):
        kinds[0][i :: len(kinds)] = values[i :: len(kinds)]
    return kinds[0]


def numbers(kind: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers of a kind."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    normal = torch.randn(shape, generator=generator)

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    if kind == "normal":
        values = normal
    elif kind == "small":  # as scales are
        values = normal.abs() * 0.02 + 0.001
    elif kind == "signed":
        values = normal * 0.02
    elif kind == "zeros":  # of both signs
        values = torch.where(chance(0.1, *shape), normal, normal * 0)
    elif kind == "outliers":
        values = torch.where(chance(0.02, *shape), normal * 1000, normal)
    elif kind == "one-hot":
        values = torch.zeros(shape).scatter_(1, torch.randint(0, shape[1], (shape[0], 1), generator=generator), 1.0)
    elif kind == "subnormals":
        values = torch.randint(0, round(1 / info.eps), shape, generator=generator) * smallest * normal.sign().double()
    elif kind == "not finite":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, shape, generator=generator)]
        values = torch.where(chance(0.01, *shape), odd, normal)
    elif kind == "largest":
        values = normal.sign() * info.max
    elif kind == "extremes":  # each row within a range of exponents of its own
        lowest, highest = torch.rand((2, shape[0], 1), generator=generator, dtype=torch.float64).sort(0).values
        exponents = torch.lerp(lowest, highest, torch.rand(shape, generator=generator, dtype=torch.float64))
        least, most = (torch.tensor(end, dtype=torch.float64).log2() for end in (smallest, info.max))
        values = torch.exp2(torch.lerp(least, most, exponents)).clamp(max=info.max) * normal.sign()
    else:
        half = 2 ** (info.bits - 1)
        bits = torch.randint(-half, half, shape, generator=generator)
        values = bits.to(torch.int16 if info.bits == 16 else torch.int32).view(dtype)
        if kind == "any finite":
            values = values.nan_to_num(1.0, 1.0, -1.0)
        else:  # NaN and inf hide what is beside them: half of the rows have none
            assert kind == "any bits", kind
            values = torch.where(chance(0.5, shape[0], 1), values, normal.to(dtype))
    return values.to(dtype)


def _put_into_one_another(made: Arguments, choose: random.Random) -> None:
    """Have the order of rows and qzeros lie in qweight, and scales in x: all of them are only read."""
    words = made.by_name["qweight"]
    words = words[0] if isinstance(words, list) else words
    activations = made.by_name.get("x", made.by_name.get("grad"))
    order = made.by_name[made.order_name]
    if 0 < order.numel() <= words.numel():
        start = choose.randint(0, words.numel() - order.numel())
        made.by_name[made.order_name] = words.view(-1)[start : start + order.numel()].copy_(order)
    for name, index, tensor in made.tensors():
        source = {"qzeros": words, "scales": activations}.get(name)
        if source is not None and source.dtype == tensor.dtype and source.numel() >= tensor.numel():
            start = choose.randint(0, source.numel() - tensor.numel())
            made.put(name, index, source.view(-1)[start : start + tensor.numel()].view(tensor.shape))


def put_side_by_side(made: Arguments, choose: random.Random, *, overlap: int) -> None:
    """Have qweight and q_perm lie in one buffer, with ``overlap`` words in common."""
    qweight, q_perm = made.by_name["qweight"], made.by_name["q_perm"]
    start = choose.choice((overlap - q_perm.numel(), qweight.numel() - overlap))  # of q_perm, from that of qweight on
    begin = min(0, start)
    buffer = torch.zeros(max(qweight.numel(), start + q_perm.numel()) - begin, dtype=torch.int32)
    for name, tensor, at in (("qweight", qweight, -begin), ("q_perm", q_perm, start - begin)):
        made.by_name[name] = buffer[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
    made.memory.append(buffer)


def _placed(tensor: Tensor, place: str, choose: random.Random) -> tuple[Tensor, Tensor]:
    """The same numbers in memory of another kind, and that memory."""
    if place == "inside a buffer":  # at an address that a vector may not like; what lies around it must not be read
        before, after = choose.randint(1, 40), choose.randint(1, 40)
        outside = torch.nan if tensor.is_floating_point() else -1
        buffer = torch.full((before + tensor.numel() + after,), outside, dtype=tensor.dtype)
        return buffer[before : before + tensor.numel()].view(tensor.shape).copy_(tensor), buffer
    if place == "odd strides":  # where a size leaves them open
        strides = list(tensor.stride())
        for i, size in enumerate(tensor.shape):
            if size <= 1 or not tensor.numel():
                strides[i] = choose.choice((0, 1, 7, 1000))
        return tensor.as_strided(tensor.shape, strides), tensor
    if place == "lazily copied":
        return torch._lazy_clone(tensor), tensor
    if place == "negated" and tensor.is_floating_point():
        negative = -tensor
        return torch._neg_view(negative), negative
    return tensor, tensor if tensor._base is None else tensor._base
