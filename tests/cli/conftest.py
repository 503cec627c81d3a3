"""A checkpoint for the command line, and a generator that answers what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exllama_ops.checkpoint import save_gptq
from exllama_ops.nn import quantize


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 128 positions with a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=264, dtype="float32")
    model = transformers.LlamaForCausalLM(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    weights = {name: quantize(linear.weight, 4, 32) for name, linear in linears.items()}
    tensors = {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[0] not in linears}
    values = {**json.loads(config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    save_gptq(path, weights, tensors, config=values, sym=False, desc_act=False)

    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def chat_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """The same with a chat template: the first letter of each role and what was said, in brackets."""
    path = tmp_path / "chat"
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).symlink_to(file)
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role[0] }}[{{ message.content }}]{% endfor %}"
    )
    return path


class Generator:
    """In place of a `CompiledGenerator`: each answer is a text, or an error that comes after one."""

    def __init__(self, answers: Sequence[str | tuple[str, BaseException]], tokenizer: Any) -> None:
        self.prompts: list[str] = []
        self.samplers: list[Any] = []
        self.stops: list[Any] = []
        self.max_length = 128
        self.mode = None
        self.graphs = self.recompiles = 0
        self.op_calls: dict[str, int] = {}
        self._answers = iter(answers)
        self._tokenizer = tokenizer

    def warm_up(self) -> None:
        pass

    def generate(self, prompt: list[int], max_new_tokens: int, *, stop: Any, sampler: Any = None) -> Iterator[int]:
        self.prompts.append(self._tokenizer.decode(prompt))
        self.samplers.append(sampler)
        self.stops.append(stop)
        answer = next(self._answers)
        text, error = answer if isinstance(answer, tuple) else (answer, None)
        yield from self._tokenizer(text, add_special_tokens=False).input_ids[:max_new_tokens]
        if error is not None:
            raise error


@pytest.fixture
def answering(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Generator]:
    """Makes the generator of the next session answer what is said."""
    transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')
    from exllama_ops.integrations import generation

    def answer(*answers: str | tuple[str, BaseException]) -> Generator:
        generator = Generator(answers, transformers.AutoTokenizer.from_pretrained(checkpoint))
        monkeypatch.setattr(generation, "CompiledGenerator", lambda *args, **kwargs: generator)
        return generator

    return answer
