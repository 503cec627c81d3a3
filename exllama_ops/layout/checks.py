"""Every rule for the arguments of the ops, in one place.

The fakes, the reference and the Python backends call these functions. The native backends repeat the texts, and the
error-table test compares the two. The rules look at shapes, strides, dtypes, devices and storages, never at data;
`check_index_values` is the one exception, for indices on a CPU. They are written with ``torch._check_value``, so that
they hold while tracing. The number of tokens M stands in none of them, so that no rule specialises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS, SUPPORTED_BITS
from exllama_ops.layout.groups import num_groups

if TYPE_CHECKING:
    from exllama_ops.layout.experts import Experts
    from exllama_ops.layout.weight import Parts, Weight

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


# Tensors of these keys have no memory that can be looked at: what is traced, transformed or on the meta device.
_TRACED = ("Python", "Functionalize", "Meta", "FuncTorchBatched", "FuncTorchGradWrapper")


def _has_memory(tensor: Tensor) -> bool:
    keys = torch._C._dispatch_keys(tensor)
    return not any(keys.has(getattr(torch._C.DispatchKey, key)) for key in _TRACED)


def _check_tensor(
    op: str, name: str, tensor: Tensor, ndim: int, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """The rules of one tensor; ``device`` is that of the op's first argument, and None for that argument itself."""
    # The dispatcher passes None where a schema has Tensor. Vectors are indices, which callers may want to leave out.
    hint = "; an empty int32 tensor means none" if ndim == 1 else ""
    torch._check_value(tensor is not None, lambda: f"{op}: {name} must be a tensor; got None{hint}")
    torch._check_value(
        tensor.dim() == ndim,
        lambda: f"{op}: {name} must have {ndim} dimension{'s' * (ndim > 1)}; got {tensor.dim()}",
    )
    torch._check_value(
        tensor.dtype in dtypes,
        lambda: f"{op}: {name} must be {'one of ' * (len(dtypes) > 1)}{_names(dtypes)}; got {tensor.dtype}",
    )
    torch._check_value(
        device is None or tensor.device == device,
        lambda: f"{op}: {name} must be on {device} like the first argument; got {tensor.device}",
    )
    torch._check_value(
        _is_contiguous(tensor),
        lambda: f"{op}: {name} must be contiguous; got shape {tuple(tensor.shape)} with strides {tensor.stride()}",
    )
    if _has_memory(tensor):
        _check_storage(op, name, tensor)


def _check_storage(op: str, name: str, tensor: Tensor) -> None:
    """Whether a storage still holds its contiguous tensor: ``untyped_storage().resize_`` frees and shrinks it."""
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    torch._check_value(
        tensor.numel() == 0 or held >= needed,
        lambda: f"{op}: {name} must have a storage of at least {needed} bytes; got {held}, as if it had been freed",
    )


def _is_contiguous(tensor: Tensor) -> bool:
    """Row-major contiguity, asked so that an unbacked or symbolic leading size is compared only if the strides fail."""
    expected: int = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected and size > 1:
            return tensor.numel() == 0
        expected = expected * size
    return True


def _check_bits(op: str, bits: int) -> None:
    torch._check_value(bits in FORMATS, lambda: f"{op}: bit must be one of {SUPPORTED_BITS}; got {bits}")


def fills_words(size: int, bits: int) -> bool:
    """Whether ``size`` values of ``bits`` bits, at least one, fill whole 32-bit words."""
    return size > 0 and size % FORMATS[bits].block_values == 0


def words_rule(name: str, size: object, bits: int) -> str:
    """The text of the rule that `fills_words` tests."""
    unit = FORMATS[bits].block_values
    return (
        f"{name} must be a positive multiple of {unit}, the {bits}-bit values that fill whole 32-bit words; got {size}"
    )


def _check_fills_words(op: str, name: str, size: int, bits: int) -> None:
    torch._check_value(fills_words(size, bits), lambda: f"{op}: {words_rule(name, f'{name}={size}', bits)}")


def _check_rows(op: str, qweight: Tensor, bits: int) -> int:
    """The K that the rows of qweight hold."""
    fmt = FORMATS[bits]
    words = qweight.shape[0]
    torch._check_value(
        words > 0 and words % fmt.block_words == 0,
        lambda: (
            f"{op}: qweight must have a positive multiple of {fmt.block_words} rows of words for bits={bits}; "
            f"got shape {tuple(qweight.shape)}"
        ),
    )
    return words * 32 // bits


def check_gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """The rules of gptq_shuffle.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    _check_reordering("gptq_shuffle", qweight, q_perm, bit)
    torch._check_value(
        q_perm.shape[0] == 0 or not _overlap(qweight, q_perm),
        lambda: (
            "gptq_shuffle: q_perm must share no memory with qweight, which is overwritten; got tensors that overlap"
        ),
    )


def check_gptq_unshuffle(qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """The rules of gptq_unshuffle.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    _check_reordering("gptq_unshuffle", qweight, q_perm, bit)


def _check_reordering(op: str, qweight: Tensor, q_perm: Tensor, bit: int) -> None:
    """What gptq_shuffle and gptq_unshuffle share."""
    _check_bits(op, bit)
    _check_tensor(op, "qweight", qweight, 2, (torch.int32,))
    _check_tensor(op, "q_perm", q_perm, 1, (torch.int32,), qweight.device)
    K = _check_rows(op, qweight, bit)
    torch._check_value(
        q_perm.shape[0] in (0, K),
        lambda: (
            f"{op}: q_perm must be empty or have shape (K,) = ({K},) for qweight of shape {tuple(qweight.shape)}, "
            f"bits={bit}; got ({q_perm.shape[0]},)"
        ),
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory; of tensors without memory, whether they do in one storage."""
    if _has_memory(a) and _has_memory(b):
        a_begin, b_begin = a.data_ptr(), b.data_ptr()
    elif a.untyped_storage()._cdata == b.untyped_storage()._cdata:
        a_begin, b_begin = (int(tensor.storage_offset()) * tensor.element_size() for tensor in (a, b))
    else:
        return False
    return a_begin < b_begin + b.nbytes and b_begin < a_begin + a.nbytes


def check_index_values(op: str, name: str, index: Tensor, limit: int, *, permutation: bool = False) -> None:
    """The rule for the values of an index, where they may be read: on a CPU, while nothing is traced.

    Args:
        op: the name that errors carry.
        name: of the argument.
        index: one-dimensional int32, or empty for none.
        limit: values lie in [0, limit).
        permutation: whether no value may come twice, since the op writes to the rows that it names.

    Raises:
        ValueError: a value breaks the rule; the text says which, and where it stands.
    """
    if index.device.type != "cpu" or not _has_memory(index):
        return
    values = index.tolist()
    wrong = next((i for i, value in enumerate(values) if not 0 <= value < limit), None)
    if wrong is not None:
        raise ValueError(f"{op}: {name} must have values in [0, {limit}); got {values[wrong]} at index {wrong}")
    if not permutation:
        return
    first_at: dict[int, int] = {}
    for i, value in enumerate(values):
        if first_at.setdefault(value, i) != i:
            raise ValueError(
                f"{op}: {name} must be a permutation; got {value} at index {first_at[value]} and at index {i}"
            )


def check_row_order_values(op: str, weight: Weight, *, writes_to_its_rows: bool = False, part: str = "") -> None:
    """`check_index_values` of a weight's row order: a permutation of the K rows, or the group of each row.

    A gather from a list that names a row twice has a result. An op that writes to the rows of a permutation would leave
    those that it does not name as they were in memory. The two lists of a filled weight must always agree.
    """
    name = f"g_idx{part}"
    if weight.is_filled:
        _check_filled_order(op, name, weight.row_order, weight.K)
        return
    limit, permutation = (weight.K, writes_to_its_rows) if weight.shuffled else (weight.G, False)
    check_index_values(op, name, weight.row_order, limit, permutation=permutation)


def _check_filled_order(op: str, name: str, row_order: Tensor, K: int) -> None:
    """That the first K entries name each row of W once, or none (-1), and the others say where."""
    if row_order.device.type != "cpu" or not _has_memory(row_order):
        return
    named, places = row_order[:K].tolist(), row_order[K:].tolist()
    for i, row in enumerate(named):
        if not -1 <= row < len(places):
            raise ValueError(
                f"{op}: {name} must have values in [-1, {len(places)}) for the {K} rows of qweight; got {row} at index "
                f"{i}"
            )
    for row, place in enumerate(places):
        if not 0 <= place < K or named[place] != row:
            raise ValueError(
                f"{op}: {name} must say at index {K + row} where {row} stands among its first {K} values; got {place}"
            )
    for i, row in enumerate(named):
        if row >= 0 and places[row] != i:
            raise ValueError(
                f"{op}: {name} must name a row of W once; got {row} at index {places[row]} and at index {i}"
            )


def check_weight(
    op: str,
    weight: Weight,
    *,
    device: torch.device | None = None,
    K: int | None = None,
    N: int | None = None,
    part: str = "",
    order_part: str = "",
) -> None:
    """The rules of a packed weight, which all ops share.

    Args:
        op: the name that errors carry.
        weight: as it came.
        device: that of the op's first argument, where there is one before the weight.
        K: the size of x, if there is an x: the rows of W, which a filled qweight has more of.
        N: the size that a gradient asks for, if there is one.
        part: the index, "[1]", of a weight in lists of them.
        order_part: that of its row order, where each weight has one of its own.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    qweight, qzeros, scales, row_order = weight.tensors
    bits, group_size = weight.bits, weight.group_size
    _check_bits(op, bits)
    _check_tensor(op, f"qweight{part}", qweight, 2, (torch.int32,), device)
    device = qweight.device if device is None else device
    _check_tensor(op, f"qzeros{part}", qzeros, 2, (torch.int32,), device)
    _check_tensor(op, f"scales{part}", scales, 2, FLOAT_DTYPES, device)
    _check_tensor(op, f"g_idx{order_part}", row_order, 1, (torch.int32,), device)

    entries, in_features = row_order.shape[0], K
    may_be_filled = weight.shuffled and (in_features is None or entries > in_features)
    rows = _check_rows(op, qweight, bits) if in_features is None or may_be_filled else in_features
    filled = may_be_filled and rows < entries <= 2 * rows and in_features in (None, entries - rows)
    if in_features is None:
        in_features = entries - rows if filled else rows
    K = rows if filled else in_features
    N = scales.shape[1] if N is None else N
    G = scales.shape[0]
    _check_fills_words(op, "K", in_features, bits)
    _check_fills_words(op, f"N{part}", N, bits)
    _check_shape(op, f"qweight{part}", qweight, "(K*bits/32, N)", (K * bits // 32, N), f"K={K}, bits={bits}")
    torch._check_value(
        G > 0, lambda: f"{op}: scales{part} must have at least one group (row); got {tuple(scales.shape)}"
    )
    _check_shape(op, f"scales{part}", scales, "(G, N)", (G, N), f"N={N}")
    _check_shape(op, f"qzeros{part}", qzeros, "(G, N*bits/32)", (G, N * bits // 32), f"G={G}, N={N}, bits={bits}")

    meaning = "the permutation argsort(g_idx)" if weight.shuffled else "the group of each row"
    longer = ", or (rows of qweight + K,) if its groups are filled" if weight.shuffled else ""
    torch._check_value(
        filled or entries in (0, K),
        lambda: (
            f"{op}: g_idx{order_part} ({meaning}, as use_exllama={weight.shuffled}) must be empty or have shape "
            f"(K,) = ({K},){longer}; got ({entries},)"
        ),
    )
    torch._check_value(
        group_size >= 0, lambda: f"{op}: group_size must be at least 1, or 0 for K / G; got {group_size}"
    )
    if not weight.shuffled and entries:
        return  # a raw g_idx says the group of every row: its groups may have any number and any sizes
    if group_size:
        torch._check_value(
            num_groups(K, group_size) == G or (filled and num_groups(K, group_size) < G),
            lambda: (
                f"{op}: scales{part} must have G = ceil(K / group_size) = {num_groups(K, group_size)} rows for K={K}, "
                f"group_size={group_size}; got {G}"
            ),
        )
    else:
        torch._check_value(
            K % G == 0,
            lambda: (
                f"{op}: group_size=0 means K / G, which must be whole; got K={K}, G{part}={G} (say the group_size of a "
                "weight whose last group is partial)"
            ),
        )


def _check_shape(op: str, name: str, tensor: Tensor, formula: str, expected: tuple[int, ...], given: str) -> None:
    torch._check_value(
        all(size == want for size, want in zip(tensor.shape, expected, strict=True)),
        lambda: f"{op}: {name} must have shape {formula} = {expected} for {given}; got {tuple(tensor.shape)}",
    )


def check_gptq_dequantize(weight: Weight) -> None:
    """The rules of gptq_dequantize.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    check_weight("gptq_dequantize", weight)


def check_gptq_gemm(x: Tensor, weight: Weight) -> None:
    """The rules of gptq_gemm.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm"
    _check_tensor(op, "x", x, 2, FLOAT_DTYPES)
    check_weight(op, weight, device=x.device, K=x.shape[1])


def check_gptq_gemm_dx(grad: Tensor, weight: Weight) -> None:
    """The rules of gptq_gemm_dx.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm_dx"
    _check_tensor(op, "grad", grad, 2, FLOAT_DTYPES)
    check_weight(op, weight, device=grad.device, N=grad.shape[1])


def check_gptq_gemm_multi(x: Tensor, parts: Parts) -> None:
    """The rules of gptq_gemm_multi: those of gptq_gemm for each part, and that the parts have the same groups.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm_multi"
    _check_tensor(op, "x", x, 2, FLOAT_DTYPES)
    lengths = parts.lengths
    torch._check_value(
        min(lengths) == max(lengths) > 0,
        lambda: f"{op}: qweight, qzeros and scales must have one entry for each part, at least 1; got {lengths}",
    )
    for i, weight in enumerate(parts.weights):
        check_weight(op, weight, device=x.device, K=x.shape[1], part=f"[{i}]")
        _check_same_groups(op, i, parts.scales)


def _check_same_groups(op: str, i: int, scales: Sequence[Tensor]) -> None:
    got, expected = scales[i].shape[0], scales[0].shape[0]
    torch._check_value(
        got == expected,
        lambda: f"{op}: scales[{i}] must have as many groups (rows) as scales[0], {expected}; got {got}",
    )


def check_gptq_moe_gemm(x: Tensor, experts: Experts) -> None:
    """The rules of gptq_moe_gemm: those of gptq_gemm for each expert, and those of the stacks.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_moe_gemm"
    _check_tensor(op, "x", x, 2, FLOAT_DTYPES)
    _check_stacks(op, experts, x.device)
    check_weight(op, experts[0], device=x.device, K=x.shape[1], part="[0]", order_part=_of_each(experts))


def check_gptq_moe_gemm_dx(grad: Tensor, experts: Experts) -> None:
    """The rules of gptq_moe_gemm_dx.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_moe_gemm_dx"
    _check_tensor(op, "grad", grad, 2, FLOAT_DTYPES)
    _check_stacks(op, experts, grad.device)
    check_weight(op, experts[0], device=grad.device, N=grad.shape[1], part="[0]", order_part=_of_each(experts))


def _of_each(experts: Experts) -> str:
    return "[0]" if experts.row_order.dim() == 2 else ""


def _check_stacks(op: str, experts: Experts, device: torch.device) -> None:
    """The rules that make the weights of all experts like that of the first."""
    _check_bits(op, experts.bits)
    _check_tensor(op, "qweight", experts.qweight, 3, (torch.int32,), device)
    _check_tensor(op, "qzeros", experts.qzeros, 3, (torch.int32,), device)
    _check_tensor(op, "scales", experts.scales, 3, FLOAT_DTYPES, device)
    row_order = experts.row_order
    none = row_order is not None and row_order.dim() == 1 and row_order.shape[0] == 0
    _check_tensor(op, "g_idx", row_order, 1 if none else 2, (torch.int32,), device)
    _check_tensor(op, "expert_offsets", experts.offsets, 1, (torch.int32,), device)
    E = experts.qweight.shape[0]
    torch._check_value(
        E > 0, lambda: f"{op}: qweight must have at least one expert; got shape {tuple(experts.qweight.shape)}"
    )
    stacks = [("qzeros", experts.qzeros), ("scales", experts.scales), *([] if none else [("g_idx", row_order)])]
    for name, stack in stacks:
        torch._check_value(
            stack.shape[0] == E,
            lambda name=name, stack=stack: (
                f"{op}: {name} must have an entry for each of the {E} experts of qweight; got {stack.shape[0]}"
            ),
        )
    torch._check_value(
        experts.offsets.shape[0] == E + 1,
        lambda: (
            f"{op}: expert_offsets must have shape (E + 1,) = ({E + 1},) for the {E} experts of qweight; "
            f"got ({experts.offsets.shape[0]},)"
        ),
    )


def check_expert_offsets(op: str, offsets: Tensor, M: int) -> None:
    """The rule for the values of expert_offsets, where they may be read: on a CPU, while nothing is traced.

    Args:
        op: the name that errors carry.
        offsets: (E + 1,) int32.
        M: rows of the op's first argument.

    Raises:
        ValueError: an offset is less than the one before it, or none of the rows.
    """
    if offsets.device.type != "cpu" or not _has_memory(offsets):
        return
    least = 0
    for i, offset in enumerate(offsets.tolist()):
        if not least <= offset <= M:
            raise ValueError(
                f"{op}: expert_offsets must not decrease, from 0 or more to the {M} rows or fewer; got {offset} at "
                f"index {i}"
            )
        least = offset
