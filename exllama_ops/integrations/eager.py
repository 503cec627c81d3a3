"""`EagerForward`: the forward of a transformers model, eager, with the model's own cache or none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

# What transformers calls the cache, in forwards and in results: newer versions first. Recurrent models have names too.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")


def returned_cache(output: Any) -> tuple[str, Any]:
    """The name and value of the cache in what a forward returned; ("", None) if there is none."""
    # Not by getattr: transformers answers to the older names as well, and warns.
    fields = vars(output)
    return next(((name, fields[name]) for name in CACHE_NAMES if fields.get(name) is not None), ("", None))


def cache_argument(model: Any, returned: str) -> str:
    """The name under which a forward takes the cache that it returned under this name.

    A model's own code may keep an older name, and a wrapper's forward may have none among its parameters.
    """
    parameters = inspect.signature(model.forward).parameters
    return returned if returned in parameters else next((name for name in CACHE_NAMES if name in parameters), returned)


def accepted(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a forward takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


@dataclass
class Text:
    """One sequence of an `EagerForward`.

    Args:
        ids: (1, tokens), all tokens of the decoder so far.
        cache: what the model returned, if it is passed back.
        encoded: what an encoder made of the prompt.
    """

    ids: Tensor | None = None
    cache: Any = None
    encoded: Any = None

    def reset(self) -> None:
        """Forget the sequence."""
        self.ids = self.cache = self.encoded = None


class EagerForward:
    """The forward of any transformers model that generates text, as transformers runs it.

    A prompt of an encoder-decoder goes into the encoder, once, and the decoder begins with the start token of its
    config.

    Args:
        model: a transformers model in eval mode.
        cached: False computes the whole sequence again for each token. So does a model that returns no cache.
    """

    graphs = recompiles = 0
    op_calls: ClassVar[dict[str, int]] = {}

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        self._model, self._cached = model, cached
        self._options = {"use_cache": cached, "logits_to_keep": 1}

    def new_cache(self, capacity: int) -> Text:
        """An empty sequence. The model's own cache grows as it needs."""
        return Text()

    def __call__(self, ids: Tensor, text: Text) -> Tensor:
        """Append tokens (1, tokens) to a sequence: the logits (vocabulary,) of the token after them."""
        arguments: dict[str, Any] = dict(self._options)
        if getattr(self._model.config, "is_encoder_decoder", False):
            if text.encoded is None:
                text.encoded = self._model.get_encoder()(input_ids=ids)
                ids = torch.full_like(ids[:, :1], start_token(self._model))
            arguments["encoder_outputs"] = text.encoded
        text.ids = ids if text.ids is None else torch.cat([text.ids, ids], 1)
        if text.cache is None:
            ids = text.ids
        else:
            name, cache = text.cache
            arguments[cache_argument(self._model, name)] = cache
        if text.encoded is None:
            arguments["input_ids"] = ids
            # A recurrent model cannot ask its cache how long the text is.
            if self._cached and "position_ids" in inspect.signature(self._model.forward).parameters:
                positions = torch.arange(text.ids.shape[1], dtype=torch.long, device=ids.device)
                arguments["position_ids"] = positions[-ids.shape[1] :].unsqueeze(0)
        else:
            arguments["decoder_input_ids"] = ids
        output = self._model(**accepted(self._model, arguments))
        name, cache = returned_cache(output)
        text.cache = (name, cache) if self._cached and name else None
        logits: Tensor = output.logits[0, -1]
        return logits


def start_token(model: Any) -> int:
    """The token that a decoder begins with.

    Raises:
        ValueError: neither config names it.
    """
    configs = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, name, None), int):
                return token
    raise ValueError(
        f"CompiledGenerator: the config of {type(model).__name__} must have decoder_start_token_id or bos_token_id, "
        "which its decoder begins with; it has neither"
    )
