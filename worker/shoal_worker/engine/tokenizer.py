"""A fast tokenizer's decoding without the detours of transformers, which take ten times as long."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from shoal.errors import InvalidRequest


class DirectTokenizer:
    """Encodes as transformers does and decodes by the tokenizer underneath.

    Args:
        tokenizer: its decoded text is not cleaned up afterwards.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Encode, with the model's own special tokens or without; the result has `input_ids`."""
        return self._tokenizer(text, add_special_tokens=add_special_tokens)

    @property
    def chat_template(self) -> Any:
        """What makes a prompt of a conversation; None where there is none."""
        return self._tokenizer.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """A conversation as a prompt.

        Raises:
            InvalidRequest: the template refuses it, as some do if roles do not alternate.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from None

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of these tokens."""
        assert not clean_up_tokenization_spaces, "nothing is cleaned up here"
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text
