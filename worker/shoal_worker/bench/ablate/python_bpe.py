"""Byte-level BPE in Python, as GPT-2's first tokenizer did it, from a fast tokenizer's own files.

transformers 5 has only the fast one. The algorithm is that of OpenAI's `encoder.py`: words by a
pattern, bytes as printable characters, then the earliest merge again and again, with a cache.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import regex
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoal.errors import ModelError

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class PythonBPE(PreTrainedTokenizer):
    """GPT-2's first tokenizer, on what transformers still has for tokenizers in Python.

    Raises:
        ModelError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        whole: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model, splitting = whole["model"], whole["pre_tokenizer"] or {}
        if model["type"] != "BPE" or splitting.get("type") != "ByteLevel":
            raise ModelError("the model's tokenizer is no byte-level BPE as GPT-2's is")
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self._vocab: dict[str, int] = model["vocab"]
        self._tokens: dict[int, str] = {token_id: token for token, token_id in self._vocab.items()}
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._prefix = " " if splitting.get("add_prefix_space") else ""
        self._words = regex.compile(_WORDS)
        self._characters: dict[int, str] = bytes_to_unicode()
        self._cache: dict[str, list[str]] = {}
        super().__init__(special_tokens_pattern="none")  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        """Tokens in it."""
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return dict(self._vocab)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens: list[str] = []
        for word in self._words.findall(self._prefix + text):
            if word not in self._cache:
                self._cache[word] = self._merged([self._characters[byte] for byte in word.encode()])
            tokens += self._cache[word]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def _merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair, len(self._ranks)), pair) for pair in pairwise(parts)]
            rank, (left, right) = min(ranked)
            if rank == len(self._ranks):
                break
            parts = _with_merge(parts, left, right)
        return parts


def _with_merge(parts: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    place = 0
    while place < len(parts):
        if parts[place : place + 2] == [left, right]:
            merged.append(left + right)
            place += 2
        else:
            merged.append(parts[place])
            place += 1
    return merged
