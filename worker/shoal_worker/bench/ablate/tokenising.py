"""Text to tokens in three ways, each as a trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerFast

from shoal_worker.bench.ablate.answers import Counts, Metrics, Run
from shoal_worker.bench.ablate.arms import Tokenising
from shoal_worker.bench.ablate.neighbours import Neighbours
from shoal_worker.bench.ablate.python_bpe import PythonBPE


class TokenisingTrial:
    """A tokenizer and the texts to encode."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, texts: list[str], way: Tokenising
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._encode = _way(tokenizer, way)

    def run(self) -> Run:
        """Encode all texts."""
        neighbours = Neighbours()
        started_s = time.perf_counter()
        encoded = self._encode(self._texts)
        duration_s = time.perf_counter() - started_s
        others_ratio = neighbours.ratio()
        tokens = [tuple(token_ids) for token_ids in encoded]
        return Run({"tokenised_per_s": sum(map(len, tokens)) / duration_s}, tokens, others_ratio)

    def peaks(self) -> Metrics:
        """Not this trial's subject."""
        return {}

    def counts(self) -> Counts:
        """How often the fast tokenizer is called."""
        kind: Any = type(self._tokenizer)
        with patch.object(kind, "__call__", autospec=True, side_effect=kind.__call__) as called:
            self.run()
        return Counts({}, {"calls of the fast tokenizer": str(called.call_count)})


def _way(
    tokenizer: PreTrainedTokenizerFast, way: Tokenising
) -> Callable[[list[str]], list[list[int]]]:
    if way == "python":
        python = PythonBPE(tokenizer)
        return lambda texts: [python(text)["input_ids"] for text in texts]
    if way == "single":
        return lambda texts: [tokenizer(text)["input_ids"] for text in texts]
    return lambda texts: tokenizer(texts)["input_ids"]
