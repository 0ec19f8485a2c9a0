"""Lanes and buckets: the fixed shapes that all decoding and prefilling runs in.

Owns the declared table and the rule that picks a lane and a bucket. Both follow from a sequence's
own class and lengths alone, never from its company or from free memory, so that the same request
always meets the same kernels. It knows no torch and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import get_args

from shoal.wire import ServiceClass
from shoal_worker.sequence import Sequence

MIN_BUCKET_TOKENS = 32
# A small lane's; a large one prefills an eighth of its slots at once, as the scheduler waits for.
BUCKET_ROWS = 16
BUCKET_TOKENS = 2048
SLOTS_PER_BUCKET_ROW = 8
SHORT_POSITIONS = 256
MIN_GPU_BULK_SLOTS, MAX_GPU_BULK_SLOTS = 8, 1024
MIN_CPU_BULK_SLOTS, MAX_CPU_BULK_SLOTS = 32, 128
CPU_LANE_BYTES = 5 * 1024**3 // 2
# A CPU is as fast with few positions as with many, so buckets are fine and small there: two steps
# of the first length, then eight between a length and its double.
FINE_BUCKET_TOKENS = 256
FINE_INTERACTIVE_TOKENS = 64
FINE_MIN_TOKENS = 16
FINE_STEPS = 8


@dataclass(frozen=True, slots=True)
class Bucket:
    """A fixed prefill shape: `rows` prompts, each padded to `length` tokens."""

    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """A fixed decode shape: `slots` rows × `kv_len` positions, for one class of requests.

    Attributes:
        fine: prefill in many small buckets, as suits a CPU, not in few large ones.
    """

    service_class: ServiceClass
    slots: int
    kv_len: int
    fine: bool = False

    @property
    def name(self) -> str:
        """How metrics and logs call it, such as `bulk-32x512`."""
        return f"{self.service_class}-{self.slots}x{self.kv_len}"

    def buckets(self) -> tuple[Bucket, ...]:
        """All prefill shapes of this lane, shortest first: lengths double up to `kv_len`.

        Fine ones grow by an eighth to a quarter.
        """
        if not self.fine:
            return _buckets(self.slots, self.kv_len)
        is_bulk = self.service_class == "bulk"
        tokens = FINE_BUCKET_TOKENS if is_bulk else FINE_INTERACTIVE_TOKENS
        return _fine_buckets(self.slots, self.kv_len, tokens)

    def bucket_for(self, num_prompt_tokens: int) -> Bucket:
        """The shortest bucket that holds a prompt of so many tokens."""
        assert num_prompt_tokens <= self.kv_len, "admission checks the prompt against the lane"
        return next(bucket for bucket in self.buckets() if num_prompt_tokens <= bucket.length)


@lru_cache
def _buckets(slots: int, kv_len: int) -> tuple[Bucket, ...]:
    lengths = []
    length = MIN_BUCKET_TOKENS
    while length < kv_len:
        lengths.append(length)
        length *= 2
    lengths.append(kv_len)
    rows = min(slots, max(BUCKET_ROWS, slots // SLOTS_PER_BUCKET_ROW))
    tokens = max(BUCKET_TOKENS, rows * BUCKET_TOKENS // BUCKET_ROWS)
    return tuple(Bucket(max(1, min(rows, tokens // length)), length) for length in lengths)


@lru_cache
def _fine_buckets(slots: int, kv_len: int, tokens: int) -> tuple[Bucket, ...]:
    lengths = []
    length = FINE_MIN_TOKENS
    while length < kv_len:
        lengths.append(length)
        octave = 1 << (length.bit_length() - 1)
        length += max(FINE_MIN_TOKENS, octave // FINE_STEPS)
    lengths.append(kv_len)
    rows = min(slots, BUCKET_ROWS)
    return tuple(Bucket(max(1, min(rows, tokens // length)), length) for length in lengths)


class LaneTable:
    """The lanes of one worker, and which of them a sequence goes to."""

    def __init__(self, lanes: Iterable[LaneSpec]) -> None:
        # Ordered to the last field: a set's own order differs from process to process.
        order = attrgetter("service_class", "kv_len", "slots", "fine")
        self.lanes = tuple(sorted(set(lanes), key=order))
        if not self.lanes:
            raise ValueError("a worker needs at least one lane")

    @property
    def num_slots(self) -> int:
        """Rows of all lanes together."""
        return sum(lane.slots for lane in self.lanes)

    def max_positions(self, service_class: ServiceClass) -> int:
        """Positions of the longest lane that this class can use."""
        return max(lane.kv_len for lane in self._for_class(service_class))

    def lane_for(self, sequence: Sequence) -> LaneSpec | None:
        """The shortest lane of the sequence's class that holds it to its last token, or None."""
        lanes = self._for_class(sequence.service_class)
        return next((lane for lane in lanes if sequence.num_positions <= lane.kv_len), None)

    def _for_class(self, service_class: ServiceClass) -> list[LaneSpec]:
        # A table of one class serves both: a worker for bulk alone needs no interactive lane.
        own = [lane for lane in self.lanes if lane.service_class == service_class]
        return own or list(self.lanes)


def default_table(
    max_positions: int, bytes_per_token: int, *, gpu_bytes: int | None = None
) -> LaneTable:
    """Few interactive slots of full length, and bulk slots: on a GPU in one lane of full length.

    There attention reads live positions alone, so lanes by length would only split the batch. On a
    CPU bulk slots come in a short and a full length.

    It follows from the model and the hardware, never from the memory that happens to be free: a
    result depends on its lane's shape.

    Args:
        bytes_per_token: what the model's cache takes for a token.
        gpu_bytes: all memory of the GPU but the model's; None on a CPU, whose lanes are smaller and
            have finer buckets.
    """
    fine = gpu_bytes is None
    lanes = [LaneSpec("interactive", 8, max_positions, fine)]
    if gpu_bytes is None:
        lens, lane_bytes = {min(SHORT_POSITIONS, max_positions), max_positions}, CPU_LANE_BYTES
        least, most = MIN_CPU_BULK_SLOTS, MAX_CPU_BULK_SLOTS
    else:
        lens, lane_bytes = {max_positions}, gpu_bytes // 2
        least, most = MIN_GPU_BULK_SLOTS, MAX_GPU_BULK_SLOTS
    for kv_len in lens:
        fitting = max(1, lane_bytes // (bytes_per_token * kv_len))
        slots = min(most, max(least, 1 << (fitting.bit_length() - 1)))
        lanes.append(LaneSpec("bulk", slots, kv_len, fine))
    return LaneTable(lanes)


def parse_table(text: str, max_positions: int, *, fine: bool = False) -> LaneTable:
    """Read a table such as `interactive=8x1024,bulk=64x256,bulk=64x1024`.

    Args:
        fine: of the lanes.

    Raises:
        ValueError: an entry is malformed, or longer than the model's `max_positions`.
    """
    return LaneTable(
        _parse_lane(entry.strip(), max_positions, fine=fine) for entry in text.split(",")
    )


def _parse_lane(entry: str, max_positions: int, *, fine: bool) -> LaneSpec:
    name, _, shape = entry.partition("=")
    slots, _, kv_len = shape.partition("x")
    classes = get_args(ServiceClass)
    if name not in classes or not (slots.isdecimal() and kv_len.isdecimal()):
        msg = f"lane {entry!r} is not CLASS=SLOTSxPOSITIONS with CLASS one of {', '.join(classes)}"
        raise ValueError(msg)
    if not (int(slots) >= 1 and 2 <= int(kv_len) <= max_positions):
        msg = (
            f"lane {entry!r} needs at least 1 slot and 2 to {max_positions} positions, "
            "which is what the model takes"
        )
        raise ValueError(msg)
    service_class: ServiceClass = "bulk" if name == "bulk" else "interactive"
    return LaneSpec(service_class, int(slots), int(kv_len), fine)
