"""Between text and tokens: prompts, conversations, and text that streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exllama_ops.cli.output import CliError, one_line
from exllama_ops.cli.remote_code import own_code


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        path: its directory.
        trust_remote_code: whether code of the directory may run.

    Raises:
        CliError: there is none that transformers can read, or it needs code that may not run.
    """
    from exllama_ops.checkpoint.disk import open_file
    from exllama_ops.extras import require

    transformers = require("transformers")
    # It opens whatever is there, waits for FIFOs, and takes pointers of Git LFS for broken files.
    for file in sorted({*path.glob("*"), *path.glob("*/*")}):
        if not file.is_dir():
            open_file(file).close()
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers' errors share no base class
        if not trust_remote_code and (code := own_code(path)):
            raise CliError(
                f"{path}: its tokenizer needs code of its own repository ({code}): pass --trust-remote-code if you "
                "trust it"
            ) from error
        raise CliError(f"{path}: must hold a tokenizer (tokenizer.json or its kin): {one_line(error)}") from error


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt, which is a message by the user where there is a chat template.

    Raises:
        CliError: it has none.
    """
    if tokenizer.chat_template:
        tokens = conversation_tokens(tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokens = tokenizer(prompt).input_ids
    if not tokens:
        raise CliError(f"--prompt: must have at least one token; {prompt!r} has none")
    return tokens


def conversation_tokens(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the model goes on.

    Raises:
        CliError: the chat template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise CliError(f"the chat template refuses messages of {roles}: {one_line(error)}") from error
    # The template has written the special tokens already.
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tokens


class TextStream:
    """Tokens in, text out, as soon as it cannot change: a character may take several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens [_start, _done) were written; they are decoded again with the next, since a space may depend on them.
        self._start = self._done = 0

    def push(self, token: int) -> str:
        """Append a token; returns the text that can be written."""
        self._tokens.append(token)
        return self._write(whole=False)

    def finish(self) -> str:
        """The text that is left."""
        return self._write(whole=True)

    def _write(self, whole: bool) -> str:
        written = self._decode(self._tokens[self._start : self._done])
        text = self._decode(self._tokens[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        piece = text[len(written) :]
        self._start, self._done = self._done, len(self._tokens)
        self.text += piece
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
