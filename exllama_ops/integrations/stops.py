"""The tokens that end a text: `stop_tokens`."""

from __future__ import annotations

from typing import Any

# An answer that no template writes of its own.
_ANSWER = "So it is, as 42 is."


def stop_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The tokens that end a text, by all who name one: the model's configs, the tokenizer and its chat template.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer; None leaves that out.
    """
    configs = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True))
    named = [getattr(config, "eos_token_id", None) for config in configs]
    if tokenizer is not None:
        named += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return frozenset(
        token for tokens in named if tokens is not None for token in ([tokens] if isinstance(tokens, int) else tokens)
    )


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that a chat template puts after an answer; None if there is none, or no template.

    Args:
        tokenizer: of transformers. Whoever renders its template for a prompt learns what is wrong with it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # of jinja2, or raised by the template for messages that it does not take
        return None
    _, answer, after = text.rpartition(_ANSWER)
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((special[text] for text in special if answer and after.lstrip().startswith(text)), None)
