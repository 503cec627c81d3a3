"""`stop_tokens`: whoever names a token that ends a text."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason='needs the extra "hf"')

from tokenizers import Tokenizer, models  # noqa: E402 (it comes with transformers)

from exllama_ops.integrations.stops import end_of_turn, stop_tokens  # noqa: E402 (it needs transformers)

WORDS = {"<unk>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<|eot|>": 4, "word": 5}


class Model:
    def __init__(self, config: Any, generation_config: Any) -> None:
        self.config = transformers.LlamaConfig(eos_token_id=config)
        self.generation_config = transformers.GenerationConfig(eos_token_id=generation_config)


def tokenizer(template: str | None = None, eos: str | None = "</s>") -> Any:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(WORDS, unk_token="<unk>")), unk_token="<unk>", eos_token=eos
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot|>"]})
    made.chat_template = template
    return made


def template(before: str, after: str) -> str:
    return "{% for message in messages %}" + before + "{{ message.content }}" + after + "{% endfor %}"


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [(None, None, set()), (None, 3, {3}), (7, [3, 5], {3, 5, 7}), ([7, 8], None, {7, 8})],
)
def test_stop_tokens_are_those_of_both_configs(config: Any, generation_config: Any, expected: set[int]) -> None:
    assert stop_tokens(Model(config, generation_config)) == expected


def test_a_token_that_only_the_tokenizer_names_stops() -> None:
    assert stop_tokens(Model(7, None), tokenizer()) == {7, WORDS["</s>"]}
    assert stop_tokens(Model(7, None), tokenizer(eos=None)) == {7}


def test_the_token_that_ends_a_turn_of_the_chat_template_stops() -> None:
    assert stop_tokens(Model(7, None), tokenizer(template("<|im_start|>", "<|im_end|>\n"))) == {7, 1, 3}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (template("", "<|im_end|>"), 3),
        (template("<|im_start|>", " <|eot|>"), 4),
        (template("<|im_start|>", ""), None),  # what begins the next turn ends no turn
        (template("", "\nword"), None),  # an ordinary token
        ("{{ messages[0].content }}<|eot|>", None),  # it leaves answers out
        ("{{ raise_exception('no') }}", None),
        ("{% if %}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_the_special_token_after_an_answer(written: str | None, expected: int | None) -> None:
    assert end_of_turn(tokenizer(written)) == expected
