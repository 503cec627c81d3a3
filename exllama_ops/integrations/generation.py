"""Generation with a transformers causal LM whose forward is compiled: layer by layer, or whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from exllama_ops.compile.packages import PackageError
from exllama_ops.integrations.layered import LayeredForward
from exllama_ops.integrations.sampling import Sampler
from exllama_ops.integrations.static_cache import cache_interface
from exllama_ops.integrations.whole import WholeForward
from exllama_ops.progress import Notify, ignore

MODES = ("layers", "whole")

_SMALLEST_BUCKET = 64

# Inductor's exceptions for a machine that lacks what its kernels are compiled with. They arrive wrapped, and under
# names that moved between versions of torch.
_NO_TOOLCHAIN = ("InvalidCxxCompiler", "TritonMissing")


class CompilerUnavailableError(RuntimeError):
    """torch.compile cannot build kernels on this machine."""


class CompiledGenerator:
    """Decoding with a static cache and a compiled forward.

    The graphs serve prompts and generations of any length. A prompt's length is a symbol in them, and so is the
    length of the cache. Positions are tensors, so no step is guarded on an int.

    - Mode "layers" compiles a decoder layer once for prompts and once for single tokens, and it serves all layers.
      With Inductor the graphs are kept in the cache folder, and a later process loads them.
    - Mode "whole" compiles the whole forward with ``fullgraph=True``, once for prompts and once for single tokens. A
      model with more layers takes longer to compile.

    Args:
        model: a transformers causal LM in eval mode whose layers have full or sliding-window attention.
        compile: False runs the forward eagerly.
        mode: "layers" or "whole". None is "layers" on a CPU, but "whole" for a model that cannot be split, and
            `notify` is told why. It is "whole" on other devices.
        backend: of torch.compile: "exllama", which is Inductor with q/k/v and gate/up in one op each, "inductor", or
            another one for tests and debugging.
        notify: takes the steps of compiling.

    Raises:
        ValueError: the model is in training mode, or has layers with another kind of cache.
        ImportError: the extra "hf" is not installed.
    """

    def __init__(
        self,
        model: Any,
        compile: bool = True,
        *,
        mode: str | None = None,
        backend: str | Callable[..., Any] = "exllama",
        notify: Notify = ignore,
    ) -> None:
        if model.training:
            raise ValueError("CompiledGenerator: model must be in eval mode; call model.eval()")
        if mode is not None and mode not in MODES:
            raise ValueError(f"CompiledGenerator: mode must be one of {', '.join(MODES)}, or None; got {mode!r}")
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.max_length: int | None = _text_config(model).to_dict().get("max_position_embeddings")
        self._interface = cache_interface(model, self.device)
        self._compile, self._mode, self._backend, self._notify = compile, mode, backend, notify
        self._forward: LayeredForward | WholeForward | None = None
        self._cache: Any = None
        self._capacity = 0
        self._length = 0
        self._generation = 0

    @property
    def mode(self) -> str | None:
        """How the forward is compiled: "layers" or "whole". None if that is not yet known, and for an eager one."""
        if self._forward is None or not self._compile:
            return None
        return "layers" if isinstance(self._forward, LayeredForward) else "whole"

    @property
    def graphs(self) -> int:
        """Graphs compiled or loaded so far."""
        return self._forward.graphs if self._forward else 0

    @property
    def recompiles(self) -> int:
        """Graphs compiled because the first ones did not serve; in mode "layers" there are none."""
        return self._forward.recompiles if isinstance(self._forward, WholeForward) else 0

    @property
    def op_calls(self) -> dict[str, int]:
        """Calls of ``torch.ops.exllama`` in a forward of "prefill" and of "decode", as far as they are compiled."""
        return self._forward.op_calls if self._forward else {}

    @property
    def cache_length(self) -> int:
        """Positions of the present cache; 0 before the first prefill."""
        return self._capacity

    def warm_up(self) -> None:
        """Compile or load all graphs, and run two steps on made-up tokens.

        Raises:
            CompilerUnavailableError: torch.compile finds no working compiler.
            ValueError: the model cannot be split, in mode "layers".
        """
        self.prefill([0, 0], 2)
        self.decode(0)

    def prefill(self, prompt: Sequence[int] | Tensor, max_new_tokens: int = 1) -> Tensor:
        """Forget the former generation and run a prompt: the logits (vocabulary,) of the token after it.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens that may follow; the cache is made large enough for them.

        Raises:
            ValueError: no token, or more positions than the model has.
            CompilerUnavailableError: as in `warm_up`.
        """
        self._generation += 1
        ids = torch.as_tensor(prompt, dtype=torch.long, device=self.device).reshape(1, -1)
        length = ids.shape[1]
        if length < 1 or max_new_tokens < 1:
            raise ValueError(
                f"CompiledGenerator: needs a prompt of at least 1 token and max_new_tokens of at least 1; got {length} "
                f"and {max_new_tokens}"
            )
        if self.max_length is not None and length + max_new_tokens > self.max_length:
            raise ValueError(
                f"CompiledGenerator: prompt and new tokens must fit the model's {self.max_length} positions; got "
                f"{length} + {max_new_tokens}"
            )
        return self._run(ids, length + max_new_tokens)

    def decode(self, token: int | Tensor) -> Tensor:
        """Append one token to the sequence: the logits (vocabulary,) of the token after it.

        Raises:
            ValueError: there was no prefill, or its cache is full.
        """
        if self._length >= self._capacity:
            state = f"all {self._capacity} positions are used" if self._capacity else "there was no prefill"
            raise ValueError(f"CompiledGenerator: the cache must have room for a token; {state}")
        return self._run(torch.as_tensor(token, dtype=torch.long, device=self.device).reshape(1, 1))

    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        stop: Collection[int] | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[int]:
        """Yield tokens as they come; the last one yielded may be a stop token.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: the most tokens to yield, at least 1.
            stop: tokens that end the text; None for those of the model's generation_config.
            sampler: draws the tokens; None takes the likeliest one each time.

        Raises:
            ValueError: as in `prefill`, or another generation was started before this one was done. Or a token cannot
                be drawn, since logits are NaN or inf.
            CompilerUnavailableError: as in `warm_up`.
        """
        stops = stop_tokens(self.model) if stop is None else frozenset(stop)
        choose = Tensor.argmax if sampler is None else sampler
        logits = self.prefill(prompt, max_new_tokens)
        generation = self._generation
        for remaining in reversed(range(max_new_tokens)):
            # The token stays on its device for the next step; reading it is what waits for this one.
            token = choose(logits)
            value = int(token)
            if value < 0:
                raise ValueError("CompiledGenerator: logits must be finite to draw a token; they are NaN or inf")
            yield value
            if value in stops or not remaining:
                return
            if self._generation != generation:
                raise ValueError("CompiledGenerator: one generation at a time; another one was started meanwhile")
            logits = self.decode(token)

    def _run(self, ids: Tensor, room: int | None = None) -> Tensor:
        """One step. With ``room`` it begins a sequence of at most so many tokens."""
        try:
            if self._forward is None:
                self._forward = self._made_forward()
            with torch.inference_mode():
                if room is not None:
                    self._make_room(self._forward, room)
                logits: Tensor = self._forward(ids, self._cache)
        except Exception as error:
            reason = _missing_toolchain(error)
            if reason is None:
                raise
            raise CompilerUnavailableError(
                f"torch.compile has no working compiler for {self.device.type}: {reason}. Install one (g++ or clang++ "
                "for the CPU; the variable CXX names another), or run without compilation: --no-compile on the command "
                "line, CompiledGenerator(model, compile=False) in Python."
            ) from error
        self._length += ids.shape[1]
        return logits

    def _made_forward(self) -> LayeredForward | WholeForward:
        if self._compile and self._mode != "whole" and (self._mode == "layers" or self.device.type == "cpu"):
            try:
                return LayeredForward(self.model, backend=self._backend, notify=self._notify, interface=self._interface)
            except ValueError as error:
                if self._mode == "layers":
                    raise
                self._notify(f"{error}; its whole forward is compiled, which takes longer")
        if self._compile:
            self._notify("compiling the whole forward: prefill and decode")
        return WholeForward(self.model, self._interface, compile=self._compile, backend=self._backend)

    def _make_room(self, forward: LayeredForward | WholeForward, length: int) -> None:
        """An empty cache of more than ``length - 1`` positions, in a power of two unless the model has fewer."""
        bucket = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
        if self.max_length is not None:
            bucket = min(bucket, self.max_length)
        self._length = 0
        if bucket == self._capacity:
            self._cache.reset()
            return
        self._cache, self._capacity = None, 0  # frees the former cache before the next is made
        self._cache, self._capacity = forward.new_cache(bucket), bucket


def stop_tokens(model: Any) -> frozenset[int]:
    """The end-of-sequence tokens of a model's generation_config."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _missing_toolchain(error: BaseException) -> str | None:
    """The reason, if a missing compiler is behind an error."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if any(name in (type(current).__name__, *str(current).split(":")[:1]) for name in _NO_TOOLCHAIN):
            return str(current).partition("\n")[0]
        if isinstance(current, PackageError):  # of another process, whose last words it holds
            lines = [line for line in str(current).splitlines() if any(name in line for name in _NO_TOOLCHAIN)]
            if lines:
                return lines[-1].rpartition("Error: ")[2].partition("InvalidCxxCompiler: ")[2] or lines[-1]
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
    return None
