"""Decoding directly gives transformers' own text."""

from __future__ import annotations

import random

import pytest
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

from shoal.errors import InvalidRequest
from shoal_worker.engine.tokenizer import DirectTokenizer

DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def test_any_tokens_decode_to_the_same_text() -> None:
    tokenizer, draw = tiny_tokenizer(), random.Random(0)
    direct = DirectTokenizer(tokenizer)

    for length in (0, 1, 2, 7, 40) * 20:
        token_ids = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
        assert direct.decode(token_ids, **DECODING) == tokenizer.decode(token_ids, **DECODING)


def test_encoding_is_the_tokenizer_s() -> None:
    tokenizer = tiny_tokenizer()

    encoded = DirectTokenizer(tokenizer)("Grüße aus Köln.")

    assert encoded["input_ids"] == tokenizer("Grüße aus Köln.")["input_ids"]


def test_a_conversation_is_rendered_and_tokenised_as_transformers_does() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    direct = DirectTokenizer(tokenizer)
    messages = [{"role": "user", "content": "Grüße"}]

    text = direct.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == "<user>Grüße<assistant>"
    assert direct(text, add_special_tokens=False)["input_ids"] == tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_what_a_template_refuses_is_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        DirectTokenizer(tokenizer).apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )


def test_a_tokenizer_without_a_template_says_so() -> None:
    assert DirectTokenizer(tiny_tokenizer()).chat_template is None
