"""`Sampler` against probabilities, nuclei and draws computed in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from exllama_ops.integrations.sampling import Sampler

LOGITS = [2.0, -1.0, 0.5, 2.0, -math.inf, 1.25, 0.0, 3.0]
DRAWS = 6000


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def nucleus(probabilities: list[float], top_p: float) -> list[int]:
    """Token by token, the likeliest first, until their exact sum reaches top_p."""
    chosen: list[int] = []
    total = Fraction(0)
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        chosen.append(token)
        total += Fraction(probabilities[token])
        if total >= top_p:
            break
    return chosen


def draws(sampler: Sampler, logits: list[float], count: int = DRAWS) -> Counter[int]:
    tensor = torch.tensor(logits)
    return Counter(int(sampler(tensor)) for _ in range(count))


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.9), (0.7, 0.5), (2.0, 0.97), (1.0, 0.3)]
)
def test_tokens_are_drawn_in_proportion_to_their_probability_in_the_nucleus(temperature: float, top_p: float) -> None:
    probabilities = softmax(LOGITS, temperature)
    chosen = [token for token in nucleus(probabilities, top_p) if probabilities[token] > 0]
    mass = sum(probabilities[token] for token in chosen)
    found = draws(Sampler(temperature, top_p, seed=0), LOGITS)
    assert set(found) == set(chosen)
    expected = {token: DRAWS * probabilities[token] / mass for token in chosen}
    chi_square = sum((found[token] - expected[token]) ** 2 / expected[token] for token in chosen)
    # The mean of chi-square is its degrees of freedom d, and its variance 2d: this is 5 standard deviations above.
    degrees = len(chosen) - 1
    assert chi_square <= degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95])
def test_no_token_outside_the_nucleus_of_a_large_vocabulary_is_drawn(top_p: float, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(5000, generator=torch.Generator().manual_seed(1))).to(dtype)
    chosen = nucleus(softmax(logits.tolist(), 0.8), top_p)
    assert 1 < len(chosen) < 3000
    sampler = Sampler(0.8, top_p, seed=0)
    found = {int(sampler(logits)) for _ in range(1000)}
    # Two tokens whose sums lie on either side of top_p by less than float32's rounding may change places.
    assert found <= set(nucleus(softmax(logits.tolist(), 0.8), top_p * (1 + 1e-6)))
    assert chosen[0] in found


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    """Sums of these powers of two are exact, so one token more or less would be seen."""
    probabilities = [1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]
    logits = [math.log(p) if p else -math.inf for p in probabilities]
    assert torch.tensor(logits).softmax(0).tolist() == probabilities
    for top_p, expected in [(0.5, {1}), (0.500001, {1, 3}), (0.75, {1, 3}), (0.750001, {0, 1, 3}), (1.0, {0, 1, 3, 4})]:
        assert set(draws(Sampler(1.0, top_p, seed=0), logits, 300)) == expected, top_p


def test_a_tiny_top_p_or_temperature_gives_the_largest_logit() -> None:
    logits = 100 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    for sampler in (Sampler(top_p=1e-12), Sampler(top_p=5e-324), Sampler(1e-6), Sampler(5e-324), Sampler(1e-40, 0.5)):
        assert {int(sampler(logits)) for _ in range(20)} == {int(logits.argmax())}


def test_a_huge_temperature_draws_all_allowed_tokens_alike() -> None:
    assert set(draws(Sampler(1e300, seed=0), LOGITS, 500)) == {0, 1, 2, 3, 5, 6, 7}


def test_of_equal_tokens_the_first_are_in_the_nucleus() -> None:
    assert set(draws(Sampler(top_p=0.5, seed=0), [1.0] * 8, 300)) == {0, 1, 2, 3}
    assert set(draws(Sampler(top_p=1e-9, seed=0), [0.0, 1.0, 1.0, 0.0], 20)) == {1}


def test_a_seed_repeats_its_tokens_and_another_does_not() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3))

    def sequence(seed: int | None, top_p: float) -> list[int]:
        sampler = Sampler(1.0, top_p, seed)
        return [int(sampler(logits)) for _ in range(20)]

    for top_p in (0.9, 1.0):
        assert sequence(7, top_p) == sequence(7, top_p)
        assert sequence(7, top_p) != sequence(8, top_p)
        assert sequence(None, top_p) != sequence(None, top_p)
        assert len(set(sequence(2**64 - 1, top_p))) > 1


def test_neither_the_global_generator_nor_the_logits_are_touched() -> None:
    logits = torch.tensor(LOGITS)
    before, state = logits.clone(), torch.get_rng_state()
    Sampler(0.5, 0.9, seed=1)(logits)
    Sampler(0.5)(logits)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [0.0, math.inf], [-math.inf, -math.inf], [math.inf, -math.inf]])
def test_logits_without_probabilities_give_minus_one(bad: list[float], top_p: float) -> None:
    assert int(Sampler(1.0, top_p)(torch.tensor(bad))) == -1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_nothing_is_read_from_the_device(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor has no values: whatever needs one on the host raises. There are no generators for it."""
    monkeypatch.setattr(Sampler, "_generator_of", lambda sampler, device: None)
    token = Sampler(0.8, top_p)(torch.empty(100, device="meta"))
    assert (token.shape, token.dtype, token.device.type) == ((), torch.int64, "meta")


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_token_is_one_int64(top_p: float) -> None:
    with torch.inference_mode():
        token = Sampler(1.0, top_p, 0)(torch.zeros(1))
    assert (token.shape, token.dtype, int(token)) == ((), torch.int64, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0; got 0.0"),
        ({"temperature": -1.0}, "temperature must be finite and above 0; got -1.0"),
        ({"temperature": math.inf}, "temperature must be finite and above 0; got inf"),
        ({"temperature": math.nan}, "temperature must be finite and above 0; got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1; got nan"),
        ({"seed": -1}, r"seed must be None or in \[0, 2\*\*64\); got -1"),
        ({"seed": 2**64}, r"seed must be None or in \[0, 2\*\*64\); got"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Sampler: {message}"):
        Sampler(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "logits", [torch.zeros(1, 5), torch.zeros(0), torch.zeros(()), torch.zeros(5, dtype=torch.int)]
)
def test_other_shapes_and_dtypes_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^Sampler: logits must have shape \(vocabulary,\)"):
        Sampler()(logits)
