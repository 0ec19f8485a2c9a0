"""Lanes and buckets: which shape a sequence meets, and that nothing else decides it."""

from __future__ import annotations

import random
from itertools import pairwise, permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.wire import SamplingParams, ServiceClass
from shoal_worker.lanes import (
    BUCKET_ROWS,
    BUCKET_TOKENS,
    Bucket,
    LaneSpec,
    LaneTable,
    default_table,
    parse_table,
)
from shoal_worker.sequence import Sequence, SequenceKey

CLASSES = st.sampled_from(["interactive", "bulk"])
SIZES = (st.integers(1, 40), st.integers(2, 5000))
COARSE = st.builds(LaneSpec, CLASSES, *SIZES)
FINE = st.builds(LaneSpec, CLASSES, *SIZES, fine=st.just(value=True))
SPECS = COARSE | FINE
TABLES = st.lists(SPECS, min_size=1, max_size=5)


def sequence(
    num_prompt_tokens: int, max_tokens: int, service_class: ServiceClass = "bulk"
) -> Sequence:
    return Sequence(
        SequenceKey("job", 0, 0),
        prompt_token_ids=(1,) * num_prompt_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        service_class=service_class,
    )


@settings(deadline=None)
@given(SPECS)
def test_buckets_double_from_the_shortest_up_to_the_lane(spec: LaneSpec) -> None:
    lengths = [bucket.length for bucket in spec.buckets()]

    assert lengths[-1] == spec.kv_len
    assert all(shorter < longer <= 2 * shorter for shorter, longer in pairwise(lengths))


@settings(deadline=None)
@given(FINE)
def test_fine_buckets_leave_little_room_behind_a_prompt(spec: LaneSpec) -> None:
    lengths = [bucket.length for bucket in spec.buckets()]

    assert lengths[0] == min(16, spec.kv_len)
    assert all(longer - shorter <= max(16, shorter // 8) for shorter, longer in pairwise(lengths))


@settings(deadline=None)
@given(SPECS)
def test_buckets_have_rows_for_slots_and_bounded_work(spec: LaneSpec) -> None:
    for bucket in spec.buckets():
        assert 1 <= bucket.rows <= min(spec.slots, BUCKET_ROWS)
        assert bucket.rows == 1 or bucket.rows * bucket.length <= BUCKET_TOKENS


def test_a_large_lane_prefills_an_eighth_of_its_slots_at_once() -> None:
    buckets = LaneSpec("bulk", 1024, 256).buckets()

    assert buckets == (Bucket(128, 32), Bucket(128, 64), Bucket(128, 128), Bucket(64, 256))


@settings(deadline=None)
@given(SPECS, st.data())
def test_a_prompt_meets_the_shortest_bucket_that_holds_it(
    spec: LaneSpec, data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(1, spec.kv_len))

    bucket = spec.bucket_for(num_tokens)

    holding = [b for b in spec.buckets() if b.length >= num_tokens]
    assert bucket == min(holding, key=lambda b: b.length)


def test_a_prompt_longer_than_the_lane_is_a_mistake_of_admission() -> None:
    with pytest.raises(AssertionError, match="admission"):
        LaneSpec("bulk", 1, 64).bucket_for(65)


def test_a_prompt_on_a_buckets_edge_still_fits() -> None:
    lane = LaneSpec("bulk", 4, 100)

    assert lane.buckets() == (Bucket(4, 32), Bucket(4, 64), Bucket(4, 100))
    assert [lane.bucket_for(n).length for n in (32, 33, 64, 65, 100)] == [32, 64, 64, 100, 100]


@settings(deadline=None)
@given(TABLES, st.integers(1, 5100), st.integers(1, 5100), CLASSES)
def test_a_sequence_meets_the_shortest_lane_of_its_class_that_holds_it_to_its_end(
    specs: list[LaneSpec], num_prompt_tokens: int, max_tokens: int, service_class: ServiceClass
) -> None:
    one = sequence(num_prompt_tokens, max_tokens, service_class)

    lane = LaneTable(specs).lane_for(one)

    own = [spec for spec in specs if spec.service_class == service_class] or specs
    holding = [spec.kv_len for spec in own if spec.kv_len >= num_prompt_tokens + max_tokens]
    if lane is None:
        assert not holding
    else:
        assert lane in own
        assert lane.kv_len == min(holding)


@settings(deadline=None)
@given(TABLES, st.randoms(use_true_random=False), st.integers(1, 3000))
@example([LaneSpec("bulk", 3, 64), LaneSpec("bulk", 3, 64, fine=True)], random.Random(0), 1)
def test_a_table_is_the_same_in_whatever_order_it_was_declared(
    specs: list[LaneSpec], shuffler: random.Random, length: int
) -> None:
    shuffled = specs * 2
    shuffler.shuffle(shuffled)

    one, other = LaneTable(specs), LaneTable(shuffled)

    assert one.lanes == other.lanes
    assert one.lane_for(sequence(length, 1)) == other.lane_for(sequence(length, 1))


def test_lanes_that_differ_only_in_slots_are_always_in_one_order() -> None:
    specs = [LaneSpec("bulk", slots, 64) for slots in (16, 2, 8, 4)]

    tables = {LaneTable(order).lanes for order in permutations(specs)}

    assert tables == {tuple(sorted(specs, key=lambda spec: spec.slots))}


def test_a_worker_of_one_class_serves_both() -> None:
    table = LaneTable([LaneSpec("bulk", 4, 64)])

    assert table.lane_for(sequence(1, 1, "interactive")) == table.lanes[0]
    assert table.max_positions("interactive") == 64


def test_each_class_has_its_own_longest_lane() -> None:
    table = LaneTable([LaneSpec("interactive", 1, 64), LaneSpec("bulk", 1, 512)])

    assert table.max_positions("interactive") == 64
    assert table.max_positions("bulk") == 512


def test_a_table_counts_the_slots_of_all_lanes() -> None:
    assert default_table(1024, 72 * 1024).num_slots == 8 + 128 + 32


@pytest.mark.parametrize(
    ("gib", "bytes_per_token", "slots"),
    [
        *(
            (139, 36 * 1024, 1024),
            (79, 36 * 1024, 1024),
            (23, 36 * 1024, 256),
            (15, 36 * 1024, 128),
        ),
        *((79, 180 * 1024, 128), (9, 512 * 1024, 8), (-1, 36 * 1024, 8), (139, 1, 1024)),
    ],
)
def test_the_default_bulk_lane_of_a_gpu_is_one_within_half_of_its_memory(
    gib: int, bytes_per_token: int, slots: int
) -> None:
    table = default_table(1024, bytes_per_token, gpu_bytes=gib * 1024**3)

    assert [lane.slots for lane in table.lanes if lane.service_class == "bulk"] == [slots]
    assert not any(lane.fine for lane in table.lanes)


@pytest.mark.parametrize(
    ("bytes_per_token", "slots"), [(72 * 1024, [128, 32]), (2 * 1024**2, [32, 32]), (1, [128, 128])]
)
def test_the_default_lanes_of_a_cpu_are_smaller_and_prefill_in_finer_buckets(
    bytes_per_token: int, slots: list[int]
) -> None:
    table = default_table(1024, bytes_per_token)

    assert [lane.slots for lane in table.lanes if lane.service_class == "bulk"] == slots
    assert all(lane.fine for lane in table.lanes)


def test_a_table_without_lanes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one lane"):
        LaneTable([])


@pytest.mark.parametrize("max_positions", [2, 100, 256, 257, 1024, 131_072])
@pytest.mark.parametrize("gpu_bytes", [8 * 1024**3, None])
def test_the_default_table_takes_each_class_to_the_models_length(
    max_positions: int, gpu_bytes: int | None
) -> None:
    table = default_table(max_positions, 1024, gpu_bytes=gpu_bytes)

    assert len({lane.name for lane in table.lanes}) == len(table.lanes)
    for service_class in ("interactive", "bulk"):
        assert table.lane_for(sequence(max_positions - 1, 1, service_class)) is not None
        assert table.lane_for(sequence(max_positions, 1, service_class)) is None


def test_a_table_is_read_from_text() -> None:
    table = parse_table("interactive=8x1024, bulk=64x256,bulk=64x1024", 1024)

    assert [lane.name for lane in table.lanes] == [
        "bulk-64x256",
        "bulk-64x1024",
        "interactive-8x1024",
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "bulk", "bulk=", "bulk=8", "bulk=x8", "bulk=8x", "bulk=8x64x2", "fast=8x64"),
        *("bulk=-1x64", "bulk=8x6.4", "bulk=8x64,", "Bulk=8x64", "bulk=²x64"),
    ],
)
def test_a_malformed_table_is_refused_with_its_entry(text: str) -> None:
    with pytest.raises(ValueError, match=r"lane '.*' is not CLASS=SLOTSxPOSITIONS"):
        parse_table(text, 1024)


@pytest.mark.parametrize("text", ["bulk=0x64", "bulk=1x1", "bulk=1x0", "bulk=1x1025"])
def test_a_lane_out_of_range_is_refused_with_what_the_model_takes(text: str) -> None:
    with pytest.raises(ValueError, match="at least 1 slot and 2 to 1024 positions"):
        parse_table(text, 1024)
