"""`CacheCheck`: whether a model computes the same with a cache as without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from exllama_ops.backends.cpu.precision import get_cpu_matmul_precision
from exllama_ops.integrations.eager import EagerForward
from exllama_ops.integrations.positions import largest_window, named_numbers
from exllama_ops.integrations.static_cache import CacheInterface, cache_interface
from exllama_ops.integrations.whole import WholeForward

# Tokens of the check: all but the last are a prompt.
_TOKENS = 7
# Roundings of a hidden state in a decoder layer: two sums, two norms, and those within attention and MLP.
_ROUNDINGS = 16
# What a product rounds to at least, whatever the dtype is: a sum of 4096 floats, or our activations on a CPU.
_PRODUCT_UNITS = {"highest": 2.0**-18, "high": 2.0**-11, "medium": 2.0**-7}
# No rounding explains that much of the logits.
_MOST_NOISE = 0.25
_LONGEST_REASON = 200
# Most texts are shorter. A larger cache is checked when it is made.
_MOST_TEXTS = 1024


class CacheCheck:
    """A prompt of a few tokens and one more token, whose logits are known from a forward of all at once.

    The difference of two results is the norm of their difference, divided by the norm of the logits. A shift of all
    logits is taken off first, since no choice of a token sees it. `tolerance` is how much of it rounding explains.

    Args:
        model: a transformers model in eval mode.
        device: of its inputs.
        most: how many positions it has; None if there is no limit.

    Attributes:
        tokens: (1, tokens).
        interface: how the model takes a cache; None for an encoder-decoder, and for a model that fails with a cache.
    """

    def __init__(self, model: Any, device: torch.device, most: int | None) -> None:
        self._model, self._most = model, most
        count = _TOKENS if most is None else max(min(_TOKENS, most), 2)
        self.tokens = torch.tensor([_plain_tokens(model, count)], dtype=torch.long, device=device)
        self.interface: CacheInterface | None = None
        self._failure = ""
        if not getattr(model.config, "is_encoder_decoder", False):
            try:
                self.interface = cache_interface(model, self.tokens)
            except Exception as error:  # of the model's code, which has its own classes
                self._failure = first_words(error)

    def first_capacity(self) -> int:
        """Above every window that the config names, and as long as most texts, if the model has so many positions."""
        capacity = max(_MOST_TEXTS, largest_window(self._model.config) + 1)
        return capacity if self._most is None else min(capacity, self._most)

    def reason_against_static(self, capacity: int) -> str:
        """Why a static cache of so many positions does not serve the model; empty if it does."""
        if self.interface is None:
            return self._failure or "it is an encoder-decoder"
        if self.interface.reason:
            return self.interface.reason
        forward = WholeForward(self._model, self.interface, compile=False, backend="eager")
        where = f"a static cache of {capacity} positions"
        try:
            logits = self._steps(forward, forward.new_cache(capacity))
        except Exception as error:
            return f"its forward fails with {where}: {first_words(error)}"
        return self.reason_against(logits, where)

    def reason_against_own(self) -> str:
        """Why the model's own cache does not serve it; empty if it does."""
        if self.interface is not None and not self.interface.argument:
            return "it returns no cache"
        if self._own_difference <= self.tolerance:
            return ""
        if self._failure:
            return f"its forward fails with its own cache: {self._failure}"
        return self._too_far("its own cache", self._own_difference)

    def reason_against(self, logits: Tensor, where: str) -> str:
        """Why logits (2, vocabulary) of the last two tokens are not those of the model; empty if they are."""
        difference = self._difference_of(logits)
        return "" if difference <= self.tolerance else self._too_far(where, difference)

    def _too_far(self, where: str, difference: float) -> str:
        return (
            f"its logits with {where} are {difference:.1%} away from those without a cache, of which rounding explains "
            f"{self.tolerance:.1%}"
        )

    @cached_property
    def tolerance(self) -> float:
        """``2 sqrt(16 layers) unit``: roundings are independent, so they add up as a random walk does, in both results.

        Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5),
        2019, https://doi.org/10.1137/18M1226312.
        """
        unit = max(torch.finfo(self._expected.dtype).eps / 2, _PRODUCT_UNITS[get_cpu_matmul_precision()])
        layers = getattr(self._model.config.get_text_config(decoder=True), "num_hidden_layers", None) or 1
        return min(2 * math.sqrt(_ROUNDINGS * layers) * unit, _MOST_NOISE)

    @cached_property
    def _expected(self) -> Tensor:
        if self.interface is not None:
            return self.interface.logits
        without_cache = EagerForward(self._model, cached=False)
        return self._steps(without_cache, without_cache.new_cache(0))

    @cached_property
    def _own_difference(self) -> float:
        own = EagerForward(self._model)
        try:
            return self._difference_of(self._steps(own, own.new_cache(0)))
        except Exception as error:
            self._failure = first_words(error)
            return math.inf

    def _steps(self, forward: Callable[[Tensor, Any], Tensor], cache: Any) -> Tensor:
        with torch.inference_mode():
            return torch.stack([forward(self.tokens[:, :-1], cache), forward(self.tokens[:, -1:], cache)])

    def _difference_of(self, logits: Tensor) -> float:
        return max(_difference(*pair) for pair in zip(logits.double(), self._expected.double(), strict=True))


def first_words(error: Exception) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def _plain_tokens(model: Any, count: int) -> list[int]:
    """Tokens from all over a vocabulary that stand for themselves, and for no picture."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = {number for name, number in named_numbers(model.config.to_dict()) if "token" in name}
    plain = [token for token in range(vocabulary) if token not in special] or [0]
    return [plain[(index + 1) * len(plain) // (count + 1)] for index in range(count)]


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Of (vocabulary,) where the expected ones are finite: a model may forbid tokens by -inf."""
    finite = expected.isfinite()
    logits, expected = logits[finite], expected[finite]
    if logits.numel() == 0:
        return 0.0
    logits, expected = logits - logits.mean(), expected - expected.mean()
    difference = float((logits - expected).norm())
    if difference == 0:
        return 0.0
    return difference / float(expected.norm()) if math.isfinite(difference) and expected.any() else math.inf
