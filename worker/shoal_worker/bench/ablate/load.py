"""What every arm runs: how many prompts, how long, in which lanes, and how often. Pure data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pydoc_data.topics import topics

from shoal.errors import ModelError
from shoal.wire import GenerationRequest, SamplingParams
from shoal_worker.bench.ablate.arms import Arm
from shoal_worker.bench.ablate.schedules import OneBucketLane
from shoal_worker.lanes import LaneSpec, LaneTable

TOP_K = 50


@dataclass(frozen=True, slots=True)
class Load:
    """A workload and how patiently it is measured.

    Attributes:
        slots: of each lane.
        short_len, long_len: positions of two lanes, or of the only one, the long one, where the
            device has one by default. No lane is longer than the model takes.
        lone_prompts: of the prompts, for arms that run one at a time.
        prompt_tokens, new_tokens: least and most; new tokens are exponential between them.
        num_texts: paragraphs to tokenise.
        min_pairs: even where an arm's take longer than `budget_s`; it has no more than max_pairs.
        together: switches measured in the same rounds, each arm a process with its own memory.
        fresh_pairs: of processes that only load the model.
        side_by_side: what is not timed, such as warming up, goes on in several processes at once.
    """

    slots: int
    short_len: int
    long_len: int
    num_prompts: int
    lone_prompts: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    mean_new_tokens: int
    num_texts: int
    min_pairs: int
    max_pairs: int
    fresh_pairs: int
    budget_s: float
    together: int
    side_by_side: bool = False

    def requests(self, arm: Arm, vocab_size: int) -> list[GenerationRequest]:
        """The prompts of an arm; those of two arms are equal as far as they go."""
        lengths, news, ids = random.Random(0), random.Random(1), random.Random(2)  # noqa: S311
        least, most = self.new_tokens
        return [
            GenerationRequest(
                prompt=[
                    ids.randrange(vocab_size - 1)
                    for _ in range(lengths.randint(*self.prompt_tokens))
                ],
                sampling=SamplingParams(
                    max_tokens=min(
                        most, max(least, int(news.expovariate(1 / self.mean_new_tokens)))
                    ),
                    temperature=1.0,
                    top_k=TOP_K,
                    seed=number,
                    ignore_eos=True,
                ),
                service_class="bulk",
            )
            for number in range(self.lone_prompts if arm.slots == 1 else self.num_prompts)
        ]

    def table(self, arm: Arm, max_positions: int, *, fine: bool = False) -> LaneTable:
        """The lanes of an arm.

        Args:
            fine: as a lane is on a CPU.

        Raises:
            ModelError: the model takes less than the workload has.
        """
        longest = self.prompt_tokens[1] + self.new_tokens[1]
        if max_positions < longest:
            raise ModelError(
                f"the model takes {max_positions} positions and the benchmark's longest sequence "
                f"has {longest}; name a model with a longer context"
            )
        slots = arm.slots or self.slots
        long_len = min(self.long_len, max_positions)
        if not arm.grouping:
            longest_prompt = self.prompt_tokens[1]
            return LaneTable([OneBucketLane("bulk", slots, long_len, prompt_len=longest_prompt)])
        by_length = fine if arm.lanes_by_length is None else arm.lanes_by_length
        lens = {min(self.short_len, long_len), long_len} if by_length else {long_len}
        return LaneTable([LaneSpec("bulk", slots, kv_len, fine) for kv_len in lens])

    def texts(self) -> list[str]:
        """Paragraphs of Python's own manual, which every installation has."""
        paragraphs = (p for text in topics.values() for p in text.split("\n\n") if p.strip())
        return list(islice(paragraphs, self.num_texts))

    def described(self) -> str:
        """In one line."""
        prompts = "–".join(map(str, self.prompt_tokens))
        news = "–".join(map(str, self.new_tokens))
        return (
            f"{self.num_prompts} prompts of {prompts} tokens, {news} new tokens each "
            f"({self.mean_new_tokens} on average before the bounds), top-k {TOP_K}, "
            f"lanes of {self.slots} slots and up to {self.long_len} positions"
        )


LOADS = {
    ("cpu", True): Load(
        slots=4,
        short_len=64,
        long_len=1024,
        num_prompts=6,
        lone_prompts=1,
        prompt_tokens=(8, 32),
        new_tokens=(3, 12),
        mean_new_tokens=6,
        num_texts=400,
        min_pairs=3,
        max_pairs=6,
        fresh_pairs=3,
        budget_s=9,
        together=5,
    ),
    ("cpu", False): Load(
        slots=32,
        short_len=256,
        long_len=1024,
        num_prompts=64,
        lone_prompts=2,
        prompt_tokens=(16, 128),
        new_tokens=(8, 256),
        mean_new_tokens=64,
        num_texts=4000,
        min_pairs=3,
        max_pairs=10,
        fresh_pairs=6,
        budget_s=300,
        together=4,
    ),
    ("cuda", True): Load(
        slots=128,
        short_len=256,
        long_len=512,
        num_prompts=256,
        lone_prompts=2,
        prompt_tokens=(16, 128),
        new_tokens=(8, 256),
        mean_new_tokens=64,
        num_texts=400,
        min_pairs=3,
        max_pairs=5,
        fresh_pairs=3,
        budget_s=2,
        together=4,
        side_by_side=True,
    ),
    ("cuda", False): Load(
        slots=512,
        short_len=256,
        long_len=512,
        num_prompts=1024,
        lone_prompts=2,
        prompt_tokens=(16, 128),
        new_tokens=(8, 256),
        mean_new_tokens=64,
        num_texts=4000,
        min_pairs=3,
        max_pairs=8,
        fresh_pairs=4,
        budget_s=5,
        together=4,
        side_by_side=True,
    ),
}
