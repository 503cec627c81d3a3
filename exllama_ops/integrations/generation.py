"""Generation with a transformers causal LM whose forward is compiled: layer by layer, or whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError, TorchRuntimeError, Unsupported, UserError

from exllama_ops.compile.packages import PackageError
from exllama_ops.integrations.cache_check import CacheCheck, first_words
from exllama_ops.integrations.eager import EagerForward
from exllama_ops.integrations.layered import LayeredForward
from exllama_ops.integrations.positions import position_limit, turning_point
from exllama_ops.integrations.sampling import Sampler
from exllama_ops.integrations.stops import stop_tokens
from exllama_ops.integrations.whole import WholeForward
from exllama_ops.progress import Notify, ignore

MODES = ("layers", "whole")

_SMALLEST_BUCKET = 64

# Inductor's exceptions for a machine that lacks what its kernels are compiled with. They arrive wrapped, and under
# names that moved between versions of torch.
_NO_TOOLCHAIN = ("InvalidCxxCompiler", "TritonMissing")

# Of a whole forward whose Python code Dynamo does not follow.
_UNTRACEABLE = (Unsupported, UserError, TorchRuntimeError, InternalTorchDynamoError)


class CompilerUnavailableError(RuntimeError):
    """torch.compile cannot build kernels on this machine."""


Forward = LayeredForward | WholeForward | EagerForward


class CompiledGenerator:
    """Decoding with a static cache and a compiled forward, or eagerly where a static cache does not serve the model.

    When it is made, a few tokens are computed with a static cache and without one, and again before a larger cache is
    used than was checked. If the logits differ by more than rounding explains, the model runs eagerly with its own
    cache. So do models with another kind of cache, and encoder-decoders, whose encoder takes the prompt. Without a
    cache that is right, each token computes the whole text. One line says so, to `notify` or as a warning.

    The graphs serve prompts and generations of any length. A prompt's length is a symbol in them, and so is the
    length of the cache. Positions are tensors, so no step is guarded on an int.

    - Mode "layers" compiles a decoder layer once for prompts and once for single tokens, and it serves all layers.
      With Inductor the graphs are kept in the cache folder, and a later process loads them.
    - Mode "whole" compiles the whole forward with ``fullgraph=True``, once for prompts and once for single tokens. A
      model with more layers takes longer to compile.

    Args:
        model: a transformers model in eval mode that generates text.
        compile: False runs the forward eagerly.
        mode: "layers" or "whole". None is "layers" on a CPU, but "whole" for a model that cannot be split, and
            `notify` is told why. It is "whole" on other devices.
        backend: of torch.compile: "exllama", which is Inductor with q/k/v and gate/up in one op each, "inductor", or
            another one for tests and debugging.
        notify: takes the steps of compiling.

    Raises:
        ValueError: the model is in training mode, or its prompt is sound or anything else but tokens.
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
        prompt = getattr(model, "main_input_name", "input_ids")
        if prompt != "input_ids":
            raise ValueError(
                f"CompiledGenerator: model must take tokens as its prompt; {type(model).__name__} takes {prompt}, for "
                "which model.generate serves"
            )
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.max_length = position_limit(model.config)
        self._turning_point = turning_point(model.config)
        self._is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._mode, self._backend, self._notify = mode, backend, notify
        self._compile = compile
        self._forward: Forward | None = None
        self._cache: Any = None
        self._capacity = 0
        self._text: list[Tensor] = []
        self._length = 0
        self._generation = 0
        self._check = CacheCheck(model, self.device, self.max_length)
        self._checked = 0
        self._check_cache(self._check.first_capacity())
        if compile and not isinstance(self._forward, EagerForward) and not _is_compileable(model):
            self._compile = False
            self._say("runs eagerly, since which of its experts a token takes is read while it runs", stacklevel=3)

    @property
    def mode(self) -> str | None:
        """How the forward is compiled: "layers" or "whole". None if that is not yet known, and for an eager one."""
        if self._forward is None or not self._compile or isinstance(self._forward, EagerForward):
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

        Their logits are compared with those of the model as the cache is. A model that runs eagerly has nothing to warm
        up.

        Raises:
            CompilerUnavailableError: torch.compile finds no working compiler.
            ValueError: the model cannot be split, in mode "layers".
        """
        if isinstance(self._forward, EagerForward):
            return
        *prompt, last = self._check.tokens[0].tolist()
        logits = torch.stack([self.prefill(prompt).clone(), self.decode(last)])
        if not isinstance(self._forward, EagerForward) and (reason := self._check.reason_against(logits, "its graphs")):
            self._run_eagerly(reason)

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
        if self.max_length is not None and self._positions(length, max_new_tokens) > self.max_length:
            raise ValueError(
                f"CompiledGenerator: prompt and new tokens must fit the model's {self.max_length} positions; got "
                f"{length} + {max_new_tokens}"
            )
        return self._run(ids, self._positions(length, max_new_tokens))

    def decode(self, token: int | Tensor) -> Tensor:
        """Append one token to the sequence: the logits (vocabulary,) of the token after it.

        Raises:
            ValueError: there was no prefill, or its cache is full.
        """
        if self._length >= self._capacity:
            state = f"all {self._capacity} positions are used" if self._capacity else "there was no prefill"
            raise ValueError(f"CompiledGenerator: the cache must have room for a token; {state}")
        ids = torch.as_tensor(token, dtype=torch.long, device=self.device).reshape(1, 1)
        if self._length == self._turning_point:
            return self._run(torch.cat([*self._text, ids], 1), self._capacity)
        return self._run(ids)

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
            stop: tokens that end the text; None for those that the model's configs name. `stop_tokens` has those of a
                tokenizer too.
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
            if room is not None:
                self._make_room(room)
            assert self._forward is not None
            with torch.inference_mode():
                logits = self._forward(ids, self._cache)
        except Exception as error:
            if reason := _missing_toolchain(error):
                raise CompilerUnavailableError(
                    f"torch.compile has no working compiler for {self.device.type}: {reason}. Install one (g++ or "
                    "clang++ for the CPU; the variable CXX names another), or run without compilation: --no-compile on "
                    "the command line, CompiledGenerator(model, compile=False) in Python."
                ) from error
            if self._mode is not None or not isinstance(error, _UNTRACEABLE):
                raise
            self._compile = False
            self._forward = self._made_forward()
            self._say(f"runs eagerly, since Dynamo cannot trace it: {first_words(error)}")
            with torch.inference_mode():
                logits = self._forward(ids, self._cache)
        if room is not None:
            self._text.clear()
        self._text.append(ids)
        in_encoder = room is not None and self._is_encoder_decoder
        self._length += 1 if in_encoder else ids.shape[1]
        return logits

    def _made_forward(self) -> Forward:
        interface = self._check.interface
        assert interface is not None  # else it would run eagerly
        if self._compile and self._mode != "whole" and (self._mode == "layers" or self.device.type == "cpu"):
            try:
                return LayeredForward(self.model, backend=self._backend, notify=self._notify, interface=interface)
            except ValueError as error:
                if self._mode == "layers":
                    raise
                self._notify(f"{error}; its whole forward is compiled, which takes longer")
        if self._compile:
            self._notify("compiling the whole forward: prefill and decode")
        return WholeForward(self.model, interface, compile=self._compile, backend=self._backend)

    def _make_room(self, length: int) -> None:
        """An empty cache of at least ``length`` positions, in a power of two unless the model has fewer."""
        bucket = self._bucket(length)
        self._check_cache(bucket)
        if self._forward is None:
            self._forward = self._made_forward()
        self._length = 0
        with torch.inference_mode():
            if bucket == self._capacity:
                self._cache.reset()
                return
            self._cache, self._capacity = None, 0  # frees the former cache before the next is made
            self._cache, self._capacity = self._forward.new_cache(bucket), bucket

    def _bucket(self, length: int) -> int:
        bucket = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
        return bucket if self.max_length is None else min(bucket, self.max_length)

    def _positions(self, prompt: int, new: int) -> int:
        """How many positions a text takes. A prompt that goes into an encoder takes none of the decoder's."""
        return max(prompt, new + 1) if self._is_encoder_decoder else prompt + new

    def _check_cache(self, capacity: int) -> None:
        """See that a static cache of so many positions serves the model, and run it eagerly if not."""
        if isinstance(self._forward, EagerForward) or capacity <= self._checked:
            return
        self._checked = capacity
        if reason := self._check.reason_against_static(capacity):
            self._run_eagerly(reason)

    def _run_eagerly(self, reason: str) -> None:
        without = self._check.reason_against_own()
        self._forward = EagerForward(self.model, cached=not without)
        self._cache, self._capacity = None, 0
        how = f"without a cache, since {without}" if without else f"with its own cache: {reason}"
        self._say(f"runs eagerly {how}")

    def _say(self, what: str, stacklevel: int = 5) -> None:
        line = f"{type(self.model).__name__} {what}"
        if self._notify is ignore:
            warnings.warn(f"CompiledGenerator: {line}", stacklevel=stacklevel)  # where the generator is made
        else:
            self._notify(line)


def _is_compileable(model: Any) -> bool:
    """Whether the quantizer that loaded a model says that its forward can be one graph; True for other models."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "is_compileable", True))


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
