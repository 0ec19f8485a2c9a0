"""Decoding directly gives transformers' own text."""

from __future__ import annotations

import random

from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

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
