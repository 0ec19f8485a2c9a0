"""The workloads that figures are given for: prompts of token ids, lengths drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from shoal.wire import MAX_REQUESTS_PER_JOB, GenerationRequest, SamplingParams
from shoal_worker.messages import Submit

WORKLOADS = ("W1", "W2")
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50}


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


def jobs(all_requests: list[GenerationRequest]) -> Iterator[Submit]:
    """The requests as the jobs that a queue would bring."""
    rest = iter(all_requests)
    number = 0
    while group := list(islice(rest, MAX_REQUESTS_PER_JOB)):
        job = {"v": 1, "requests": [request.model_dump() for request in group]}
        yield Submit(f"bench-{number}", "in-process", job, queued_s=0.0, priority=0)
        number += 1
