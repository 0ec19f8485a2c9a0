"""The workloads that figures are given for: prompts of token ids, lengths drawn from a seed.

Or the user's own prompts. Every completion runs to its `max_tokens`, whatever the model says, so
that the work is known before and the same for everybody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.bulk.readers import check_input, read_rows
from shoal.bulk.rows import FailedRow, RowDefaults
from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import GenerationRequest, GenerationResult, SamplingParams
from shoal_worker.bench.roofline import Lengths

WORKLOADS = ("W1", "W2")
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
DEFAULT_PROMPTS = {"cpu": 256, "cuda": 4096}
DEFAULT_MAX_TOKENS = 64
WARM_UP_PART = 1 / 8


@dataclass(frozen=True, slots=True)
class Choice:
    """What a person asked for.

    Attributes:
        name: W1, W2 or a file.
        prompts: at the most; None leaves it to the device, or takes the whole file.
        max_tokens: of a file's rows that do not say.
        is_quick: fewer prompts, where their number is left to us.
    """

    name: str
    prompts: int | None
    max_tokens: int = DEFAULT_MAX_TOKENS
    is_quick: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with token ids for prompts.

    Attributes:
        name: W1, W2, or the file's.
    """

    name: str
    requests: list[GenerationRequest]

    @property
    def lengths(self) -> list[Lengths]:
        """Of each request."""
        return [Lengths(len(one.prompt), one.sampling.max_tokens) for one in self.requests]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(one.prompt for one in self.lengths)

    @property
    def new_tokens(self) -> int:
        """Of all requests."""
        return sum(one.new for one in self.lengths)

    def first(self, part: float) -> Workload:
        """The first part of it, at least one request."""
        number = max(1, round(len(self.requests) * part))
        return Workload(self.name, self.requests[:number])

    def check_fits(self, max_positions: int) -> None:
        """Raises InvalidRequest if a lane of so many positions cannot hold a request."""
        longest = max(one.prompt + one.new for one in self.lengths)
        if longest > max_positions:
            raise InvalidRequest(
                f"{self.name} has a prompt and completion of {longest} tokens together; the lanes "
                f"take {max_positions}: choose another model, --lanes or --workload FILE"
            )

    def check_complete(self, results: Sequence[GenerationResult]) -> None:
        """Raises ShoalError unless every request has all the tokens that it asked for."""
        for request, result in zip(self.requests, results, strict=True):
            if result.error is not None:
                raise ShoalError(f"a request of {self.name} failed: {result.error.message}")
            made, asked = result.usage.completion_tokens, request.sampling.max_tokens
            if made != asked:
                raise ShoalError(f"a request of {self.name} made {made} tokens of {asked}")


def chosen_workload(
    choice: Choice, device_kind: str, vocab_size: int, encode: Callable[[str], list[int]]
) -> Workload:
    """W1, W2 or a file's, as large as was wanted.

    Args:
        device_kind: cpu or cuda.
        encode: a text's token ids.
    """
    if choice.name in WORKLOADS:
        number = choice.prompts or DEFAULT_PROMPTS[device_kind] // (4 if choice.is_quick else 1)
        return Workload(choice.name, requests(choice.name, number, vocab_size))
    path = Path(choice.name)
    return Workload(path.name, file_requests(path, choice.prompts, choice.max_tokens, encode))


def requests(workload: str, num_prompts: int, vocab_size: int) -> list[GenerationRequest]:
    """Prompts of 16 to 128 tokens; W1 wants 64 new tokens of each, W2 8 to 256, 64 on average."""
    lengths, news, ids = random.Random(0), random.Random(1), random.Random(2)  # noqa: S311
    return [
        GenerationRequest(
            prompt=[ids.randrange(vocab_size - 1) for _ in range(lengths.randint(16, 128))],
            sampling=SamplingParams(
                max_tokens=64 if workload == "W1" else _expovariate(news),
                seed=number,
                ignore_eos=True,
                **SAMPLING,
            ),
            service_class="bulk",
        )
        for number in range(num_prompts)
    ]


def _expovariate(draw: random.Random) -> int:
    return min(max(int(draw.expovariate(1 / 64)), 8), 256)


def file_requests(
    path: Path, limit: int | None, max_tokens: int, encode: Callable[[str], list[int]]
) -> list[GenerationRequest]:
    """The rows of an input of `shoal bulk`, with their own sampling where they bring it.

    Args:
        limit: rows at the most.
        max_tokens: of rows that do not say.
        encode: a text's token ids.

    Raises:
        InvalidRequest: the file cannot be read, is empty, or a row of it is none.
    """
    check_input(path)
    defaults = RowDefaults({"max_tokens": max_tokens, **SAMPLING})
    found = []
    for row in islice(read_rows(path, defaults), limit):
        if isinstance(row, FailedRow):
            raise InvalidRequest(f"{path}, line {row.place.line}: {row.error.message}")
        found.append(_to_its_end(row.request, encode))
    if not found:
        raise InvalidRequest(f"{path} holds no prompts")
    return found


def _to_its_end(
    request: GenerationRequest, encode: Callable[[str], list[int]]
) -> GenerationRequest:
    prompt = encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
    whole = {"ignore_eos": True, "stop": [], "stop_token_ids": [], "min_tokens": 0, "n": 1}
    sampling = request.sampling.model_copy(update=whole)
    return request.model_copy(update={"prompt": prompt, "sampling": sampling})
