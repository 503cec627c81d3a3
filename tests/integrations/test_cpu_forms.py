"""Attention and the output layer as they are written for Inductor, against loops over plain Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch._inductor.utils import run_and_get_cpp_code

pytest.importorskip("transformers", reason='needs the extra "hf"')

from exllama_ops.integrations.cpu_forms import (
    Attend,
    attend_many,
    attend_one,
    attend_one_eagerly,
    fast_eager_attention,
    fast_forms,
    multiply_rows,
)
from integrations.test_generation import random_model

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS, GROUPS, LENGTH, DIM, SCALE = 6, 2, 9, 8, 0.3


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Of batch 1 as a flat list; mask is what is added, or bool."""
    results = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        for token in range(query.shape[2]):
            scores = []
            for position in range(LENGTH):
                allowed = mask[0, 0, token, position].item()
                added = (0.0 if allowed else -math.inf) if isinstance(allowed, bool) else allowed
                pairs = zip(query[0, head, token].tolist(), key[0, group, position].tolist(), strict=True)
                scores.append(SCALE * sum(q * k for q, k in pairs) + added)
            powers = [math.exp(score - max(scores)) for score in scores]
            for column in range(DIM):
                values = value[0, group, :, column].tolist()
                results.append(sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers))
    return results


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("attend", "tokens"), [(attend_one, 1), (attend_one_eagerly, 1), (attend_many, 4)])
def test_attention_is_the_softmax_of_masked_products(
    attend: Attend, tokens: int, dtype: torch.dtype, kind: torch.dtype
) -> None:
    query = random(1, HEADS, tokens, DIM, dtype=dtype)
    # As the generator has them: memory (length, groups, dim), seen from another side.
    key, value = (
        random(LENGTH, GROUPS, DIM + extra, dtype=dtype)[..., :DIM].transpose(0, 1).unsqueeze(0) for extra in (0, 1)
    )
    allowed = torch.arange(LENGTH) <= torch.arange(tokens).unsqueeze(1) + LENGTH - tokens - 2
    mask = allowed[None, None]
    if kind != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    result = attend(query, key, value, mask, SCALE)
    assert result.dtype == dtype
    assert result.shape == (1, HEADS, tokens, DIM)
    expected = torch.tensor(exact_attention(query, key, value, mask), dtype=torch.float64)
    # Float32 sums of some 2^5 terms, then one rounding to the dtype; torch's bfloat16 kernel rounds the weights too.
    eps, largest = torch.finfo(dtype).eps, value.double().abs().max()
    rounded = eps * largest if dtype == torch.bfloat16 and tokens > 1 else 0.0
    bound = eps / 2 * expected.abs() + 2**-18 * largest + rounded
    assert bool(((result.double().flatten() - expected).abs() <= bound).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    x, weight = random(1, 1, 64, dtype=dtype), random(10, 64, dtype=dtype)
    added = random(10, dtype=dtype) if bias else None
    result = multiply_rows(x, weight, added)
    assert result.dtype == dtype
    for n, got in enumerate(result.flatten().tolist()):
        products = [a * b for a, b in zip(x.flatten().tolist(), weight[n].tolist(), strict=True)]
        exact = math.fsum(products) + (added[n].item() if added is not None else 0.0)
        size = math.fsum(map(abs, products)) + abs(exact)
        assert abs(got - exact) <= torch.finfo(dtype).eps / 2 * abs(exact) * 1.001 + 66 * 2**-24 * size


def test_a_norm_before_the_output_layer_is_not_computed_for_each_column() -> None:
    x, weight = random(1, 1, 64, dtype=torch.float16), random(3072, 64, dtype=torch.float16)

    def tail(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return multiply_rows(torch.nn.functional.rms_norm(x, (64,)), weight, None)

    _, code = run_and_get_cpp_code(torch.compile(tail), x, weight)
    kernel = code[code.index('extern "C"') : code.index("''')")]
    norm, _, columns = kernel.partition("(3072L)")
    assert "sqrt" in norm
    assert "sqrt" not in columns


def test_the_forms_are_in_place_only_while_graphs_are_traced() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = random_model("Llama")
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with fast_forms(model, torch.device("cpu")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not former
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former
    assert "forward" not in vars(model.lm_head)
    with fast_forms(model, torch.device("meta")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_more_arguments_is_left_to_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: calls.append(kwargs))
    with fast_forms(random_model("Llama"), torch.device("cpu")):
        tensor = torch.zeros(1, 2, 1, 4)
        ALL_ATTENTION_FUNCTIONS["sdpa"](None, tensor, tensor, tensor, torch.zeros(1, 1, 1, 1), **{name: tensor})
    assert list(calls[0]) == [name]


def test_eager_forms_of_several_threads_leave_the_place_as_it_was() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    device = torch.device("cpu")
    first, second = fast_eager_attention(device), fast_forms(random_model("Llama"), device)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not former
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former
    with fast_eager_attention(torch.device("meta")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former
