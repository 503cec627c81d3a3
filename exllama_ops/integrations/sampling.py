"""Drawing the next token from logits: `Sampler`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SEEDS = 2**64
_FLOAT32 = torch.finfo(torch.float32)


class Sampler:
    """Draw tokens by temperature and nucleus: ``p = softmax(logits / temperature)``, cut to the likeliest tokens.

    The nucleus is the smallest set of tokens whose probabilities add up to at least ``top_p``. It holds one token or
    more, and of equally likely ones those with lower numbers first. A token of it is drawn in proportion to p. The
    probabilities are float32, their sums float64. Nothing is read back to the host, so a GPU runs on without waiting.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751.

    Args:
        temperature: above 0. A lower one makes likely tokens likelier. For the likeliest token alone, use no sampler.
        top_p: in (0, 1]. 1 keeps every token.
        seed: in [0, 2**64). The same seed draws the same tokens from the same logits on a device of the same kind.
            None takes a seed from the system.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"Sampler: temperature must be finite and above 0; got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"Sampler: top_p must be above 0 and at most 1; got {top_p}")
        if seed is not None and not 0 <= seed < _SEEDS:
            raise ValueError(f"Sampler: seed must be None or in [0, 2**64); got {seed}")
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        # A temperature that float32 lacks would divide by 0 or by inf.
        self._divisor = min(max(temperature, _FLOAT32.tiny), _FLOAT32.max)
        self._generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw a token.

        Args:
            logits: (vocabulary,) of any float dtype. -inf forbids a token. The first call makes the generator on their
                device, and so does a call on another device.

        Returns:
            The token, 0-d int64 on the device of the logits. It is -1 if logits are NaN or +inf, or all are -inf:
            raising an error would have to wait for the device.

        Raises:
            ValueError: the logits have another shape or no float dtype.
        """
        if logits.dim() != 1 or logits.numel() == 0 or not logits.is_floating_point():
            raise ValueError(
                "Sampler: logits must have shape (vocabulary,) with at least one token, and a float dtype; got "
                f"{tuple(logits.shape)} {logits.dtype}"
            )
        logits = logits.to(torch.float32)
        # The largest is subtracted first, so that dividing by a small temperature cannot overflow to inf.
        probabilities = ((logits - logits.amax()) / self._divisor).softmax(0)
        if self.top_p < 1:
            # Floats from 0 on are ordered as their bits are, and int32 is sorted by radix: 12 times faster on a CPU.
            keys, tokens = (-probabilities.view(torch.int32)).sort(stable=True)
            sums = (-keys).view(torch.float32).cumsum(0, dtype=torch.float64)
            mass = _at(sums, torch.searchsorted(sums, sums.new_full((), self.top_p)))
        else:
            sums = probabilities.cumsum(0, dtype=torch.float64)
            mass = sums.narrow(0, -1, 1).squeeze(0)
        uniform = torch.rand((), dtype=torch.float64, device=logits.device, generator=self._generator_of(logits.device))
        # The first token whose sum exceeds the number drawn, so never one of probability 0.
        token = torch.searchsorted(sums, uniform * mass, right=True)
        if self.top_p < 1:
            token = _at(tokens, token)
        return torch.where(mass.isfinite(), token, -1)

    def _generator_of(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
        return self._generator


def _at(values: Tensor, index: Tensor) -> Tensor:
    """The value at a 0-d index on the device; one past the last gives the last."""
    return values.take(index.clamp(max=values.numel() - 1))
