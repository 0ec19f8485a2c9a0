"""A sequence: one completion being made, from its tokens in to its last token out.

Pure data. It knows no torch, no Redis and no clock: times are seconds handed in by the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.wire import FinishReason, SamplingParams, ServiceClass


class SequenceKey(NamedTuple):
    """Where a sequence belongs: the job, the request's place in it, the sample's number."""

    job_id: str
    request_index: int
    sample: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: the chosen token's and the likeliest tokens'."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the engine made of one row at one position."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making.

    Attributes:
        seed: keys the sampling noise together with the sample, position and token id.
        stop_token_ids: tokens that end it, the model's end tokens included unless ignored.
        queue: the RQ queue that its job came from; events name it.
        truncated_tokens: how many tokens its prompt lost at the start.
        priority: smaller is served first.
        arrival_s: when it reached the engine; deadline_s: when it must end, on the same clock.
        lane: the name of its lane, and slot its row there, while it is running.
    """

    key: SequenceKey
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    service_class: ServiceClass = "interactive"
    stop_token_ids: frozenset[int] = frozenset()
    queue: str = ""
    truncated_tokens: int = 0
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    lane: str | None = None
    slot: int | None = None
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prefill_started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_positions(self) -> int:
        """Positions it can come to need in a lane: its prompt and all its new tokens."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    @property
    def ended_by_token(self) -> bool:
        """Whether its last token is the stop token that ended it."""
        tokens = self.output_token_ids
        return self.finish_reason == "stop" and bool(tokens) and tokens[-1] in self.stop_token_ids

    def append(self, token: SampledToken) -> None:
        """Take one more token and end if it is a stop token or the last one allowed."""
        assert not self.is_finished, "a finished sequence takes no more tokens"
        self.extend([token])

    def extend(self, tokens: list[SampledToken]) -> None:
        """Take more tokens up to its end, and none behind it."""
        # Every token that is generated comes through here: no look-up is made twice.
        token_ids, sampling = self.output_token_ids, self.sampling
        num_tokens = len(token_ids)
        if sampling.logprobs is None and self.finish_reason is None:
            new_ids = [token.token_id for token in tokens]
            if self.stop_token_ids.isdisjoint(new_ids):
                room = sampling.max_tokens - num_tokens
                token_ids += new_ids[:room]
                if len(new_ids) >= room:
                    self.finish_reason = "length"
                return
        for token in tokens:
            if self.finish_reason is not None:
                return
            token_ids.append(token.token_id)
            num_tokens += 1
            if token.logprobs is not None:
                self.output_logprobs.append(token.logprobs)
            if token.token_id in self.stop_token_ids and num_tokens > sampling.min_tokens:
                self.finish_reason = "stop"
            elif num_tokens >= sampling.max_tokens:
                self.finish_reason = "length"

    def truncate(self, num_tokens: int) -> None:
        """Drop the tokens past these: they were made before a stop string was seen."""
        del self.output_token_ids[num_tokens:]
        del self.output_logprobs[num_tokens:]
