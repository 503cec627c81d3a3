"""Every rule for the arguments of the ops, in one place.

The fakes, the reference and the Python backends call these functions; the native backends repeat the texts and are
compared with them by the error-table test. All rules look at shapes, strides, dtypes and devices only: no data is
read. They are written with ``torch._check_value`` so that they hold while tracing, and the number of tokens M stands
in none of them, so that no rule specialises it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exllama_ops.layout.formats import FORMATS, SUPPORTED_BITS
from exllama_ops.layout.groups import num_groups

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _check_tensor(
    op: str, name: str, tensor: Tensor, ndim: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    torch._check_value(
        tensor.dim() == ndim,
        lambda: f"{op}: {name} must have {ndim} dimension{'s' * (ndim > 1)}; got {tensor.dim()}",
    )
    torch._check_value(
        tensor.dtype in dtypes,
        lambda: f"{op}: {name} must be {'one of ' * (len(dtypes) > 1)}{_names(dtypes)}; got {tensor.dtype}",
    )
    torch._check_value(
        tensor.device == device,
        lambda: f"{op}: {name} must be on {device} like the first argument; got {tensor.device}",
    )
    torch._check_value(
        _is_contiguous(tensor),
        lambda: f"{op}: {name} must be contiguous; got shape {tuple(tensor.shape)} with strides {tensor.stride()}",
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


def check_gptq_shuffle(qweight: Tensor, q_perm: Tensor, bit: int, *, op: str = "gptq_shuffle") -> None:
    """The rules of gptq_shuffle and gptq_unshuffle.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    _check_bits(op, bit)
    _check_tensor(op, "qweight", qweight, 2, (torch.int32,), qweight.device)
    _check_tensor(op, "q_perm", q_perm, 1, (torch.int32,), qweight.device)
    K = _check_rows(op, qweight, bit)
    torch._check_value(
        q_perm.shape[0] in (0, K),
        lambda: (
            f"{op}: q_perm must be empty or have shape (K,) = ({K},) for qweight of shape {tuple(qweight.shape)}, "
            f"bits={bit}; got ({q_perm.shape[0]},)"
        ),
    )


def check_gptq_dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
    *,
    op: str = "gptq_dequantize",
    device: torch.device | None = None,
    K: int | None = None,
    N: int | None = None,
    part: str = "",
) -> None:
    """The rules of a packed weight: gptq_dequantize, and what the other ops share.

    The arguments up to group_size are the op's. ``op`` is the name that errors carry, ``device`` that of the op's
    first argument, K or N the size that x or grad asks for, where there is one, and ``part`` the index, "[1]", of a
    weight in lists of them.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    del use_v2_format
    device = qweight.device if device is None else device
    _check_bits(op, bit)
    _check_tensor(op, f"qweight{part}", qweight, 2, (torch.int32,), device)
    _check_tensor(op, f"qzeros{part}", qzeros, 2, (torch.int32,), device)
    _check_tensor(op, f"scales{part}", scales, 2, FLOAT_DTYPES, device)
    _check_tensor(op, "g_idx", g_idx, 1, (torch.int32,), device)

    K = _check_rows(op, qweight, bit) if K is None else K
    N = scales.shape[1] if N is None else N
    G = scales.shape[0]
    _check_fills_words(op, "K", K, bit)
    _check_fills_words(op, f"N{part}", N, bit)
    _check_shape(op, f"qweight{part}", qweight, "(K*bits/32, N)", (K * bit // 32, N), f"K={K}, bits={bit}")
    torch._check_value(
        G > 0, lambda: f"{op}: scales{part} must have at least one group (row); got {tuple(scales.shape)}"
    )
    _check_shape(op, f"scales{part}", scales, "(G, N)", (G, N), f"N={N}")
    _check_shape(op, f"qzeros{part}", qzeros, "(G, N*bits/32)", (G, N * bit // 32), f"G={G}, N={N}, bits={bit}")

    entries = g_idx.shape[0]
    meaning = "the permutation argsort(g_idx)" if use_exllama else "the group of each row"
    torch._check_value(
        entries in (0, K),
        lambda: (
            f"{op}: g_idx ({meaning}, as use_exllama={use_exllama}) must be empty or have shape (K,) = ({K},); "
            f"got ({entries},)"
        ),
    )
    torch._check_value(
        group_size >= 0, lambda: f"{op}: group_size must be at least 1, or 0 for K / G; got {group_size}"
    )
    if not use_exllama and entries:
        return  # a raw g_idx says the group of every row: its groups may have any number and any sizes
    if group_size:
        torch._check_value(
            num_groups(K, group_size) == G,
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


def check_gptq_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> None:
    """The rules of gptq_gemm.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm"
    _check_tensor(op, "x", x, 2, FLOAT_DTYPES, x.device)
    check_gptq_dequantize(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size,
        op=op, device=x.device, K=x.shape[1],
    )  # fmt: skip


def check_gptq_gemm_dx(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> None:
    """The rules of gptq_gemm_dx.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm_dx"
    _check_tensor(op, "grad", grad, 2, FLOAT_DTYPES, grad.device)
    check_gptq_dequantize(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size,
        op=op, device=grad.device, N=grad.shape[1],
    )  # fmt: skip


def check_gptq_gemm_multi(
    x: Tensor,
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> None:
    """The rules of gptq_gemm_multi: those of gptq_gemm for each part, and that the parts have the same groups.

    Raises:
        ValueError: an argument breaks a rule; the text names the op, the argument, the rule and what came.
    """
    op = "gptq_gemm_multi"
    _check_tensor(op, "x", x, 2, FLOAT_DTYPES, x.device)
    lengths = len(qweight), len(qzeros), len(scales)
    torch._check_value(
        min(lengths) == max(lengths) > 0,
        lambda: f"{op}: qweight, qzeros and scales must have one entry for each part, at least 1; got {lengths}",
    )
    for i, tensors in enumerate(zip(qweight, qzeros, scales, strict=True)):
        check_gptq_dequantize(
            *tensors, g_idx, use_exllama, bit, use_v2_format, group_size,
            op=op, device=x.device, K=x.shape[1], part=f"[{i}]",
        )  # fmt: skip
        _check_same_groups(op, i, scales)


def _check_same_groups(op: str, i: int, scales: Sequence[Tensor]) -> None:
    got, expected = scales[i].shape[0], scales[0].shape[0]
    torch._check_value(
        got == expected,
        lambda: f"{op}: scales[{i}] must have as many groups (rows) as scales[0], {expected}; got {got}",
    )
