"""The scheduler: which sequences prefill or decode next, and what becomes of their tokens.

Owns the waiting lists, the slots of every lane and the balance of prefill and decode. Pure: no
torch, no Redis, no clock. `schedule` says what to run, the loop runs it, `update` takes the tokens.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from shoal.wire import FinishReason, ServiceClass
from shoal_worker.lanes import Bucket, LaneSpec, LaneTable
from shoal_worker.sequence import SampledToken, Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence in its slot."""

    slot: int
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read these rows' prompts, all padded to one bucket, and sample each one's first token."""

    lane: LaneSpec
    bucket: Bucket
    rows: tuple[Row, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that it brings tokens of."""
        return tuple(row.sequence for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens in it."""
        return sum(len(row.sequence.prompt_token_ids) for row in self.rows)

    @property
    def num_padding_tokens(self) -> int:
        """Positions computed for nothing: the ends of prompts, and rows left empty."""
        return self.bucket.rows * self.bucket.length - self.num_tokens


@dataclass(frozen=True, slots=True)
class Decode:
    """Make the next token, or the next few, of every running row of one lane.

    Attributes:
        spent: sequences without a slot, whose last tokens are launched and not read.
    """

    lane: LaneSpec
    rows: tuple[Row, ...]
    spent: tuple[Sequence, ...] = ()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that it brings tokens of: the rows', then the spent ones."""
        return (*(row.sequence for row in self.rows), *self.spent)


Step = Prefill | Decode


@dataclass(slots=True)
class _Lane:
    """One lane's state. Invariant: a slot is either free or runs exactly one sequence.

    Attributes:
        spent: sequences that have left their slot before their last tokens were read.
        num_prefilled: rows read since the last decode.
    """

    spec: LaneSpec
    waiting: list[Sequence] = field(default_factory=list)
    running: dict[int, Sequence] = field(default_factory=dict)
    spent: dict[Sequence, None] = field(default_factory=dict)
    num_prefilled: int = 0
    _rows: tuple[Row, ...] | None = None

    def occupy(self, slot: int, sequence: Sequence) -> None:
        self.running[slot] = sequence
        self._rows = None

    def vacate(self, slot: int) -> None:
        del self.running[slot]
        self._rows = None

    def free_slots(self) -> list[int]:
        return [slot for slot in range(self.spec.slots) if slot not in self.running]

    def rows(self) -> tuple[Row, ...]:
        if self._rows is None:
            self._rows = tuple(Row(slot, self.running[slot]) for slot in sorted(self.running))
        return self._rows


class Scheduler:
    """Fills slots as they come free and takes turns between lanes.

    Args:
        table: the lanes; a sequence's lane follows from its own class and lengths.
    """

    def __init__(self, table: LaneTable) -> None:
        self.table = table
        self._lanes = {spec.name: _Lane(spec) for spec in table.lanes}
        self._last_class: ServiceClass = "bulk"
        self._turns: dict[ServiceClass, int] = {"interactive": 0, "bulk": 0}

    @property
    def num_waiting(self) -> int:
        """Sequences that no slot has yet."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    @property
    def num_running(self) -> int:
        """Sequences that have had a slot and have not ended."""
        return sum(len(lane.running) + len(lane.spent) for lane in self._lanes.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self.num_waiting or self.num_running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot of its lane; its length was checked at admission."""
        lane = self.table.lane_for(sequence)
        assert lane is not None, "admission checks every sequence against the lane table"
        sequence.lane = lane.name
        insort(self._lanes[lane.name].waiting, sequence, key=attrgetter("priority", "arrival_s"))

    def schedule(self) -> Step | None:
        """The next step: a prefill where one pays, else a decode.

        Interactive lanes get every other step if they want it, so that an interactive request waits
        for one step of bulk work at the most (and for one more that was launched ahead, where the
        engine does that); lanes of one class take turns.
        """
        classes: list[ServiceClass] = ["interactive", "bulk"]
        for service_class in sorted(classes, key=lambda name: name == self._last_class):
            step = self._next_of(service_class)
            if step is not None:
                self._last_class = service_class
                return step
        return None

    def _next_of(self, service_class: ServiceClass) -> Step | None:
        lanes = [lane for lane in self._lanes.values() if lane.spec.service_class == service_class]
        turn = self._turns[service_class]
        for offset in range(len(lanes)):
            lane = lanes[(turn + offset) % len(lanes)]
            step = self._prefill(lane) or self._decode(lane)
            if step is not None:
                self._turns[service_class] = (turn + offset + 1) % len(lanes)
                return step
        return None

    def hand_over(self, lane: LaneSpec, slot: int) -> None:
        """Free the slot of a sequence whose last token is launched: it ends when that is read."""
        state = self._lanes[lane.name]
        sequence = state.running[slot]
        state.vacate(slot)
        state.spent[sequence] = None
        sequence.slot = None

    def update(self, step: Step, tokens: list[list[SampledToken]], now_s: float) -> list[Sequence]:
        """Hand each sequence its new tokens, in order; free the slots of those that end.

        Tokens past a row's end are dropped: an engine that makes several a step does not look.

        Returns:
            The sequences that ended in this step.
        """
        sequences = step.sequences
        for sequence, new_tokens in zip(sequences, tokens, strict=True):
            if new_tokens and sequence.first_token_s is None:
                sequence.first_token_s = now_s
            sequence.extend(new_tokens)
        ended = [sequence for sequence in sequences if sequence.is_finished]
        for sequence in ended:
            self._release(sequence, now_s)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason, now_s: float) -> None:
        """End a sequence from outside: a stop string, a cancellation, a deadline."""
        sequence.finish_reason = reason
        self._release(sequence, now_s)

    def overdue(self, now_s: float) -> list[Sequence]:
        """All sequences whose deadline has passed."""
        return [s for s in self._sequences() if s.deadline_s is not None and s.deadline_s <= now_s]

    def slots_in_use(self) -> dict[str, tuple[int, int]]:
        """For each lane's name: slots that a sequence runs in, and all slots."""
        return {name: (len(lane.running), lane.spec.slots) for name, lane in self._lanes.items()}

    def kv_usage_ratio(self) -> float:
        """Share of all cache positions that hold a live token."""
        live = sum(
            len(sequence.prompt_token_ids) + len(sequence.output_token_ids)
            for lane in self._lanes.values()
            for sequence in lane.running.values()
        )
        return live / sum(spec.slots * spec.kv_len for spec in self.table.lanes)

    def _sequences(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane.waiting
            yield from lane.running.values()
            yield from lane.spent

    def _prefill(self, lane: _Lane) -> Prefill | None:
        free = lane.free_slots()
        if not (lane.waiting and free):
            return None
        # Sequences of one token free their slots at once and would keep the others from decoding.
        if (lane.running or lane.spent) and lane.num_prefilled >= lane.spec.slots:
            return None
        bucket = lane.spec.bucket_for(len(lane.waiting[0].prompt_token_ids))
        alike = (s for s in lane.waiting if lane.spec.bucket_for(len(s.prompt_token_ids)) == bucket)
        chosen = list(islice(alike, min(bucket.rows, len(free))))
        if not self._pays(lane, bucket, len(chosen), len(free)):
            return None
        rows = tuple(Row(slot, sequence) for slot, sequence in zip(free, chosen, strict=False))
        for row in rows:
            lane.waiting.remove(row.sequence)
            lane.occupy(row.slot, row.sequence)
            row.sequence.slot = row.slot
        lane.num_prefilled += len(rows)
        return Prefill(lane.spec, bucket, rows)

    @staticmethod
    def _pays(lane: _Lane, bucket: Bucket, num_rows: int, num_free: int) -> bool:
        # A bulk prefill of few rows costs as much as a full one: let an eighth of the slots come
        # free first. They do, since every running sequence ends. If there are slots for all that
        # wait, the last ones of a run would decode alone.
        if lane.spec.service_class == "interactive" or num_rows == bucket.rows:
            return True
        return num_free * 8 >= lane.spec.slots or len(lane.waiting) <= num_free

    @staticmethod
    def _decode(lane: _Lane) -> Decode | None:
        lane.num_prefilled = 0
        if not (lane.running or lane.spent):
            return None
        return Decode(lane.spec, lane.rows(), tuple(lane.spent))

    def _release(self, sequence: Sequence, now_s: float) -> None:
        assert sequence.lane is not None, "only a sequence that was added can end"
        sequence.finished_s = now_s
        lane = self._lanes[sequence.lane]
        if sequence in lane.spent:
            del lane.spent[sequence]
        elif sequence.slot is None:
            lane.waiting.remove(sequence)
        else:
            lane.vacate(sequence.slot)
            sequence.slot = None
