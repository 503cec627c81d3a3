"""The GPTQ ops of vLLM's generations: the arguments that each had, computed by this library. Nothing here needs vLLM.

vLLM changed the arguments of ``torch.ops._C.gptq_gemm`` and ``gptq_shuffle``, and of their twins in ``_custom_ops``, in
0.11.1 and in 0.30. Code that was written for one generation calls the function here that has its version in the name.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_gemm_until_0_11_0(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor,
    use_exllama: bool,
    bit: int,
) -> Tensor:
    """``a @ W`` as vLLM had it up to 0.11.0: stored zero points are the zero points minus one.

    What every generation left undefined is defined here. ``a`` and the scales may be bfloat16 or float32, which were
    read as float16. Any size of groups is right, and tensors that are not contiguous are refused. The result is new
    memory that no block of a kernel adds to before it is zeroed.

    Args:
        a: (M, K) float16, bfloat16 or float32, contiguous.
        b_q_weight: (K * bit / 32, N) int32, shuffled if use_exllama.
        b_gptq_qzeros: (K / group_size, N * bit / 32) int32.
        b_gptq_scales: (K / group_size, N) float16, bfloat16 or float32.
        b_g_idx: int32. If use_exllama, the permutation ``argsort(g_idx)``, (K,). Else the group of each row, (K,). An
            empty tensor, or one on the meta device, was a null pointer: the rows are in the order of their groups.
        use_exllama: whether b_q_weight is shuffled.
        bit: 2, 3, 4 or 8.

    Returns:
        (M, N) in the dtype of a.

    Raises:
        ValueError: an argument is wrong, or has the kind that another generation has in its place.
        TypeError: there are as many arguments as another generation has.

    Source: `exllama_ops.reference.gptq_gemm`.
    """
    _check_kinds("gptq_gemm", b_g_idx=b_g_idx, use_exllama=use_exllama, bit=bit)
    out: Tensor = torch.ops.exllama.gptq_gemm(
        a, b_q_weight, b_gptq_qzeros, b_gptq_scales, _order(b_g_idx, b_q_weight), use_exllama, bit
    )
    return out


def gptq_gemm_until_0_29(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    """``a @ W`` as vLLM had it from 0.11.1 to 0.29: the rule of zero points stands before the width.

    Args:
        a: as in `gptq_gemm_until_0_11_0`, and so are the others.
        b_q_weight: likewise.
        b_gptq_qzeros: likewise.
        b_gptq_scales: likewise.
        b_g_idx: likewise.
        use_exllama: likewise.
        use_v2_format: whether b_gptq_qzeros stores zero points, not zero points minus one.
        bit: likewise.

    Returns:
        (M, N) in the dtype of a.

    Raises:
        ValueError: an argument is wrong, or has the kind that another generation has in its place.
        TypeError: there are as many arguments as another generation has.

    Source: `exllama_ops.reference.gptq_gemm`.
    """
    _check_kinds("gptq_gemm", b_g_idx=b_g_idx, use_exllama=use_exllama, use_v2_format=use_v2_format, bit=bit)
    out: Tensor = torch.ops.exllama.gptq_gemm(
        a,
        b_q_weight,
        b_gptq_qzeros,
        b_gptq_scales,
        _order(b_g_idx, b_q_weight),
        use_exllama,
        bit,
        use_v2_format=use_v2_format,
    )
    return out


def gptq_gemm_since_0_30(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    """``a @ W`` as vLLM has it since 0.30: without a g_idx, so the rows are in the order of their groups.

    Args:
        a: as in `gptq_gemm_until_0_29`, and so are the others.
        b_q_weight: likewise.
        b_gptq_qzeros: likewise.
        b_gptq_scales: likewise.
        use_exllama: likewise.
        use_v2_format: likewise.
        bit: likewise.

    Returns:
        (M, N) in the dtype of a.

    Raises:
        ValueError: an argument is wrong, or has the kind that another generation has in its place.
        TypeError: there are as many arguments as another generation has.

    Source: `exllama_ops.reference.gptq_gemm`.
    """
    _check_kinds("gptq_gemm", use_exllama=use_exllama, use_v2_format=use_v2_format, bit=bit)
    out: Tensor = torch.ops.exllama.gptq_gemm(
        a, b_q_weight, b_gptq_qzeros, b_gptq_scales, _none(b_q_weight), use_exllama, bit, use_v2_format=use_v2_format
    )
    return out


def gptq_gemm_of_sgl_kernel(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor,
    use_shuffle: bool,
    bit: int,
) -> Tensor:
    """``a @ W`` as sgl_kernel has it: that of vLLM 0.11.0, with another name for one argument.

    Args:
        a: as in `gptq_gemm_until_0_11_0`, and so are the others.
        b_q_weight: likewise.
        b_gptq_qzeros: likewise.
        b_gptq_scales: likewise.
        b_g_idx: likewise.
        use_shuffle: whether b_q_weight is shuffled.
        bit: likewise.

    Returns:
        (M, N) in the dtype of a.

    Raises:
        ValueError: an argument is wrong, or has the kind that another generation has in its place.
        TypeError: there are as many arguments as another generation has.

    Source: `exllama_ops.reference.gptq_gemm`.
    """
    _check_kinds("gptq_gemm", b_g_idx=b_g_idx, use_shuffle=use_shuffle, bit=bit)
    return gptq_gemm_until_0_11_0(a, b_q_weight, b_gptq_qzeros, b_gptq_scales, b_g_idx, use_shuffle, bit)


def gptq_shuffle_until_0_29(q_weight: Tensor, q_perm: Tensor, bit: int) -> None:
    """Shuffle a weight in place as vLLM did up to 0.29, and as sgl_kernel does.

    Args:
        q_weight: (K * bit / 32, N) int32, contiguous, in checkpoint order. Overwritten.
        q_perm: (K,) int32, ``argsort(g_idx)``. An empty tensor, or one on the meta device, sorts no rows.
        bit: 2, 3, 4 or 8.

    Raises:
        ValueError: as `exllama_ops.gptq_shuffle`, or q_perm is no tensor.

    Source: `exllama_ops.reference.gptq_shuffle`.
    """
    _check_kinds("gptq_shuffle", q_perm=q_perm, bit=bit)
    torch.ops.exllama.gptq_shuffle(q_weight, _order(q_perm, q_weight), bit)


def gptq_shuffle_since_0_30(q_weight: Tensor, bit: int) -> None:
    """Shuffle a weight in place as vLLM does since 0.30: without an order of rows.

    Args:
        q_weight: (K * bit / 32, N) int32, contiguous, in checkpoint order. Overwritten.
        bit: 2, 3, 4 or 8.

    Raises:
        ValueError: as `exllama_ops.gptq_shuffle`, or bit is no integer.

    Source: `exllama_ops.reference.gptq_shuffle`.
    """
    _check_kinds("gptq_shuffle", bit=bit)
    torch.ops.exllama.gptq_shuffle(q_weight, _none(q_weight), bit)


# What an argument of each name is, in every generation.
_KINDS: dict[str, type] = {
    "b_g_idx": Tensor,
    "q_perm": Tensor,
    "use_exllama": bool,
    "use_shuffle": bool,
    "use_v2_format": bool,
    "bit": int,
}


def _check_kinds(op: str, **arguments: object) -> None:
    """Refuse the arguments of another generation, as far as their kinds tell."""
    for name, value in arguments.items():
        kind = _KINDS[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            got = "a Tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{op}: {name} must be {'an' if kind is int else 'a'} {kind.__name__}; got {got}. Each generation of "
                "vLLM has its own arguments: exllama_ops.integrations.vllm.signatures has a function for each"
            )


def _order(order: Tensor, qweight: Tensor) -> Tensor:
    """An order of rows; an empty tensor beside the weight for what was a null pointer."""
    if order.numel() == 0 or (order.device.type == "meta" and qweight.device.type != "meta"):
        return _none(qweight)
    return order


def _none(qweight: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=qweight.device)
