"""The scheduler, driven with plain ints: slots, order, fairness, and that everything ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from shoal.wire import SamplingParams, ServiceClass
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Decode, Prefill, Scheduler, Step
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey

STOP = 0


def sequence(
    number: int = 0,
    *,
    prompt: int = 4,
    max_tokens: int = 4,
    service_class: ServiceClass = "bulk",
    priority: int = 0,
    arrival_s: float = 0.0,
    deadline_s: float | None = None,
) -> Sequence:
    return Sequence(
        SequenceKey(f"job{number}", 0, 0),
        prompt_token_ids=(1,) * prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        service_class=service_class,
        stop_token_ids=frozenset({STOP}),
        priority=priority,
        arrival_s=arrival_s,
        deadline_s=deadline_s,
    )


def scheduler(*lanes: LaneSpec) -> Scheduler:
    return Scheduler(LaneTable(lanes))


def add_all(one: Scheduler, sequences: Iterable[Sequence]) -> list[Sequence]:
    added = list(sequences)
    for each in added:
        one.add(each)
    return added


def run(one: Scheduler, *, now_s: float = 0.0, token: int = 1) -> Step:
    """One step, with one token for each row."""
    step = one.schedule()
    assert step is not None, "there was nothing to run"
    one.update(step, [[SampledToken(token)] for _ in step.rows], now_s)
    return step


def run_until_idle(one: Scheduler) -> list[Step]:
    steps = []
    while not one.is_idle:
        steps.append(run(one))
        assert len(steps) < 10_000, "it never ends"
    return steps


def rows_of(step: Step) -> list[Sequence]:
    return [row.sequence for row in step.rows]


# --- random driving

TABLES = [
    [LaneSpec("interactive", 1, 40), LaneSpec("bulk", 1, 40)],
    [LaneSpec("interactive", 2, 80), LaneSpec("bulk", 3, 40), LaneSpec("bulk", 17, 80)],
    [LaneSpec("bulk", 40, 80)],
    [LaneSpec("interactive", 8, 80)],
    [LaneSpec("bulk", 9, 33), LaneSpec("bulk", 2, 80)],
]


class Driving(RuleBasedStateMachine):
    """Whatever is added, cancelled, stopped or too late: slots and ends stay in order."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler | None = None
        self.added: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.now_s = 0.0

    @precondition(lambda self: self.scheduler is None)
    @rule(lanes=st.sampled_from(TABLES))
    def declare(self, lanes: list[LaneSpec]) -> None:
        self.scheduler = Scheduler(LaneTable(lanes))

    @precondition(lambda self: self.scheduler is not None)
    @rule(
        target=live,
        prompt=st.integers(1, 45),
        max_tokens=st.integers(1, 6),
        service_class=st.sampled_from(["interactive", "bulk"]),
        priority=st.integers(0, 2),
        deadline_s=st.none() | st.floats(0, 50),
    )
    def add(
        self,
        prompt: int,
        max_tokens: int,
        service_class: ServiceClass,
        priority: int,
        deadline_s: float | None,
    ) -> Sequence | None:
        assert self.scheduler is not None
        one = sequence(
            len(self.added),
            prompt=prompt,
            max_tokens=max_tokens,
            service_class=service_class,
            priority=priority,
            arrival_s=self.now_s,
            deadline_s=deadline_s,
        )
        lane = self.scheduler.table.lane_for(one)
        if lane is None:
            return None
        self.scheduler.add(one)
        self.added.append(one)
        assert one.lane == lane.name
        return one

    @precondition(lambda self: self.scheduler is not None)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        tokens = st.lists(st.integers(0, 3), min_size=1, max_size=3)
        self._step(lambda: data.draw(tokens))

    @rule(one=consumes(live))
    def cancel(self, one: Sequence | None) -> None:
        if one is not None and not one.is_finished:
            assert self.scheduler is not None
            self.scheduler.finish(one, "abort", self.now_s)
            self.ended.append(one)

    @precondition(lambda self: self.scheduler is not None)
    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        assert self.scheduler is not None
        self.now_s += seconds
        overdue = self.scheduler.overdue(self.now_s)
        late = {s for s in self._open() if s.deadline_s is not None and s.deadline_s <= self.now_s}
        assert set(overdue) == late
        for one in overdue:
            self.scheduler.finish(one, "deadline", self.now_s)
            self.ended.append(one)

    @invariant()
    def a_slot_runs_one_sequence(self) -> None:
        if self.scheduler is None:
            return
        taken = [(s.lane, s.slot) for s in self._open() if s.slot is not None]
        assert len(taken) == len(set(taken)) == self.scheduler.num_running
        in_use = self.scheduler.slots_in_use()
        for spec in self.scheduler.table.lanes:
            used = [slot for lane, slot in taken if lane == spec.name]
            assert in_use[spec.name] == (len(used), spec.slots)
            assert all(0 <= slot < spec.slots for slot in used)
        assert 0.0 <= self.scheduler.kv_usage_ratio() <= 1.0

    @invariant()
    def every_sequence_waits_runs_or_has_ended_once(self) -> None:
        if self.scheduler is None:
            return
        assert len(self.ended) == len(set(self.ended))
        assert all(s.is_finished and s.slot is None for s in self.ended)
        assert set(self.scheduler._sequences()) == self._open()
        assert len(self._open()) == self.scheduler.num_waiting + self.scheduler.num_running

    def teardown(self) -> None:
        if self.scheduler is None:
            return
        num_steps = 0
        while not self.scheduler.is_idle:
            self._step(lambda: [1])
            num_steps += 1
            # A prefill for each sequence and a decode for each of its tokens, were it alone.
            assert num_steps <= 8 * len(self.added), "something starves"
        assert sorted(s.key for s in self.ended) == sorted(s.key for s in self.added)
        assert self.scheduler.schedule() is None

    def _open(self) -> set[Sequence]:
        return set(self.added) - set(self.ended)

    def _step(self, draw_tokens: Callable[[], list[int]]) -> None:
        assert self.scheduler is not None
        step = self.scheduler.schedule()
        assert (step is None) == self.scheduler.is_idle
        if step is None:
            return
        self._check(step)
        tokens = [
            [SampledToken(token) for token in draw_tokens()][
                : 1 if isinstance(step, Prefill) else 3
            ]
            for _ in step.rows
        ]
        before = [list(row.sequence.output_token_ids) for row in step.rows]
        ended = self.scheduler.update(step, tokens, self.now_s)
        self.ended += ended
        for row, old, new in zip(step.rows, before, tokens, strict=True):
            kept = row.sequence.output_token_ids[len(old) :]
            assert kept == [token.token_id for token in new][: len(kept)]
            assert kept, "every row of a step gains a token"
            assert (row.sequence in ended) == row.sequence.is_finished
            if len(kept) < len(new):
                assert row.sequence.is_finished, "tokens are dropped only behind an end"

    @staticmethod
    def _check(step: Step) -> None:
        assert 1 <= len(step.rows) <= step.lane.slots
        assert len({row.slot for row in step.rows}) == len(step.rows)
        for row in step.rows:
            assert row.sequence.lane == step.lane.name
            assert row.sequence.slot == row.slot
            assert not row.sequence.is_finished
            is_new = not row.sequence.output_token_ids
            assert is_new == isinstance(step, Prefill)
        if isinstance(step, Prefill):
            assert len(step.rows) <= step.bucket.rows
            for row in step.rows:
                # The company of other prompts never makes a prompt's shape longer.
                prompt = row.sequence.prompt_token_ids
                assert step.bucket == step.lane.bucket_for(len(prompt))
            total = step.num_tokens + step.num_padding_tokens
            assert total == step.bucket.rows * step.bucket.length


TestDriving = Driving.TestCase
TestDriving.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- single behaviours


def test_nothing_to_do_is_no_step() -> None:
    one = scheduler(LaneSpec("bulk", 2, 64))

    assert one.is_idle
    assert one.schedule() is None


def test_a_prompt_is_read_before_its_tokens_are_made() -> None:
    one = scheduler(LaneSpec("bulk", 2, 64))
    (only,) = add_all(one, [sequence(max_tokens=3)])

    steps = run_until_idle(one)

    assert [type(step) for step in steps] == [Prefill, Decode, Decode]
    assert only.finish_reason == "length"
    assert only.slot is None


def test_a_finished_slot_is_refilled_while_its_neighbours_go_on() -> None:
    one = scheduler(LaneSpec("interactive", 2, 64))
    long, short, next_one = add_all(
        one,
        (sequence(i, max_tokens=m, service_class="interactive") for i, m in enumerate((9, 2, 5))),
    )
    run(one)  # Both slots are filled,
    run(one)  # and the short one ends.

    step = run(one)

    assert isinstance(step, Prefill)
    assert rows_of(step) == [next_one]
    assert step.rows[0].slot == 1
    assert (long.is_finished, short.is_finished) == (False, True)
    assert rows_of(run(one)) == [long, next_one]


def test_a_higher_priority_takes_the_next_free_slot() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    added = add_all(
        one,
        [
            sequence(0, priority=2, arrival_s=0.0),
            sequence(1, priority=1, arrival_s=1.0),
            sequence(2, priority=1, arrival_s=2.0),
            sequence(3, priority=0, arrival_s=3.0),
        ],
    )

    steps = run_until_idle(one)

    served = [rows_of(step)[0] for step in steps if isinstance(step, Prefill)]
    assert served == [added[3], added[1], added[2], added[0]]


def test_sequences_of_one_moment_are_served_in_the_order_they_were_added() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    added = add_all(one, (sequence(i) for i in range(5)))

    steps = run_until_idle(one)

    assert [rows_of(s)[0] for s in steps if isinstance(s, Prefill)] == added


def test_a_late_arrival_at_the_back_of_the_list_does_not_pass_those_that_wait() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    later, earlier = add_all(one, [sequence(0, arrival_s=5.0), sequence(1, arrival_s=2.0)])

    assert rows_of(run(one)) == [earlier]
    assert later.slot is None


@pytest.mark.parametrize("num_bulk", [1, 40])
def test_an_interactive_prompt_waits_for_no_more_than_a_step_of_each_other_lane(
    num_bulk: int,
) -> None:
    one = scheduler(
        LaneSpec("interactive", 2, 64), LaneSpec("bulk", 32, 64), LaneSpec("bulk", 32, 128)
    )
    add_all(one, (sequence(i, max_tokens=50) for i in range(num_bulk)))
    add_all(one, (sequence(100 + i, prompt=80, max_tokens=40) for i in range(num_bulk)))
    for _ in range(5):
        run(one)
    (urgent,) = add_all(one, [sequence(999, service_class="interactive")])

    steps = [run(one) for _ in range(3)]

    assert urgent in [s for step in steps for s in rows_of(step)]


def test_an_interactive_sequence_decodes_every_second_step_beside_two_busy_lanes() -> None:
    one = scheduler(
        LaneSpec("interactive", 2, 64), LaneSpec("bulk", 4, 64), LaneSpec("bulk", 4, 128)
    )
    add_all(one, (sequence(i, max_tokens=50) for i in range(4)))
    add_all(one, (sequence(100 + i, prompt=80, max_tokens=40) for i in range(4)))
    add_all(one, [sequence(999, service_class="interactive", max_tokens=30)])
    for _ in range(6):
        run(one)

    classes = [run(one).lane.service_class for _ in range(30)]

    assert classes.count("interactive") == 15


@pytest.mark.parametrize("service_class", ["interactive", "bulk"])
def test_an_endless_row_of_one_token_prompts_does_not_keep_a_neighbour_from_decoding(
    service_class: ServiceClass,
) -> None:
    one = scheduler(LaneSpec(service_class, 4, 64))
    (long,) = add_all(one, [sequence(0, max_tokens=9, service_class=service_class)])

    for number in range(1, 200):
        waiting = (
            sequence(number * 10 + i, max_tokens=1, service_class=service_class) for i in range(4)
        )
        add_all(one, waiting)
        run(one)

    assert long.is_finished


def test_a_prompt_of_another_length_is_not_passed_for_ever() -> None:
    one = scheduler(LaneSpec("bulk", 4, 128))
    add_all(one, (sequence(i, max_tokens=3, arrival_s=i) for i in range(8)))
    (other,) = add_all(one, [sequence(8, prompt=60, max_tokens=3, arrival_s=8)])

    for number in range(9, 60):
        add_all(one, [sequence(number, max_tokens=3, arrival_s=number)])
        run(one)

    assert other.is_finished


def test_a_prefill_takes_prompts_of_one_bucket_from_behind_others() -> None:
    one = scheduler(LaneSpec("bulk", 8, 128))
    short, long, short_too = add_all(
        one, [sequence(0, prompt=5), sequence(1, prompt=60), sequence(2, prompt=32)]
    )

    first, second = one.schedule(), one.schedule()

    assert isinstance(first, Prefill)
    assert rows_of(first) == [short, short_too]
    assert isinstance(second, Prefill)
    assert rows_of(second) == [long]


def test_a_bulk_lane_waits_for_an_eighth_of_its_slots_before_it_refills() -> None:
    one = scheduler(LaneSpec("bulk", 32, 64))
    added = add_all(one, (sequence(i, max_tokens=2 + i // 2) for i in range(40)))
    while one.num_running < 32:
        run(one)
    refills = []
    while one.num_waiting:
        step = run(one)
        if isinstance(step, Prefill):
            refills.append(len(step.rows))

    assert sum(refills) == 8
    assert min(refills) >= 4
    run_until_idle(one)
    assert all(s.finish_reason == "length" for s in added)


@pytest.mark.parametrize("slots", [1, 2, 7, 8, 9, 15, 16, 17, 32, 33])
def test_bulk_lanes_of_any_size_fill_and_empty(slots: int) -> None:
    one = scheduler(LaneSpec("bulk", slots, 128))
    added = add_all(
        one,
        (sequence(i, prompt=1 + i * 37 % 100, max_tokens=1 + i * 7 % 20) for i in range(3 * slots)),
    )

    run_until_idle(one)

    assert all(s.finish_reason == "length" for s in added)


def test_a_lane_is_filled_before_it_decodes() -> None:
    one = scheduler(LaneSpec("bulk", 32, 64))
    add_all(one, (sequence(i) for i in range(40)))

    steps = [run(one) for _ in range(3)]

    assert [(type(step), len(step.rows)) for step in steps] == [
        (Prefill, 16),
        (Prefill, 16),
        (Decode, 32),
    ]


def test_tokens_behind_an_end_are_dropped() -> None:
    one = scheduler(LaneSpec("bulk", 2, 64))
    stopped, full = add_all(one, [sequence(0, max_tokens=9), sequence(1, max_tokens=3)])
    run(one)
    step = one.schedule()
    assert step is not None

    ended = one.update(step, [[SampledToken(t) for t in (5, STOP, 6, 7)]] * 2, 1.0)

    assert ended == [stopped, full]
    assert (stopped.output_token_ids, stopped.finish_reason) == ([1, 5, STOP], "stop")
    assert (full.output_token_ids, full.finish_reason) == ([1, 5, STOP], "stop")


def test_rows_and_tokens_of_different_number_are_a_mistake() -> None:
    one = scheduler(LaneSpec("bulk", 2, 64))
    add_all(one, [sequence(0), sequence(1)])
    step = one.schedule()
    assert step is not None

    with pytest.raises(ValueError, match="shorter"):
        one.update(step, [[SampledToken(1)]], 0.0)


def test_times_of_first_token_and_end_are_noted_once() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    (only,) = add_all(one, [sequence(max_tokens=2)])

    run(one, now_s=3.0)
    run(one, now_s=4.0)

    assert (only.first_token_s, only.finished_s) == (3.0, 4.0)


def test_a_waiting_sequence_can_be_ended_and_never_runs() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    first, second, third = add_all(one, (sequence(i) for i in range(3)))
    run(one)

    one.finish(second, "abort", 7.0)

    assert (second.finish_reason, second.finished_s) == ("abort", 7.0)
    served = {s for step in run_until_idle(one) for s in rows_of(step)}
    assert served == {first, third}


def test_a_running_sequence_can_be_ended_and_leaves_its_slot() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    first, second = add_all(one, (sequence(i, max_tokens=9) for i in range(2)))
    run(one)

    one.finish(first, "stop", 7.0)

    assert rows_of(run(one)) == [second]
    assert len(first.output_token_ids) == 1


def test_what_is_overdue_is_found_waiting_and_running_at_the_very_second() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))
    running, waiting, _later, _never = add_all(
        one, [sequence(i, deadline_s=d) for i, d in enumerate((5.0, 5.0, 6.0, None))]
    )
    run(one)

    assert one.overdue(4.999) == []
    assert set(one.overdue(5.0)) == {running, waiting}


def test_an_interactive_request_waits_for_one_step_of_bulk_work_at_the_most() -> None:
    one = scheduler(
        LaneSpec("interactive", 1, 64), LaneSpec("bulk", 1, 64), LaneSpec("bulk", 1, 128)
    )
    add_all(one, [sequence(0, max_tokens=9), sequence(1, prompt=100, max_tokens=9)])
    run(one)
    run(one)
    add_all(one, [sequence(2, service_class="interactive", max_tokens=9)])

    classes = [run(one).lane.service_class for _ in range(8)]

    assert classes == ["interactive", "bulk"] * 4


def test_the_cache_is_as_full_as_prompts_and_tokens_of_running_sequences() -> None:
    one = scheduler(LaneSpec("bulk", 2, 50))
    add_all(one, (sequence(i, prompt=10) for i in range(3)))

    run(one)

    assert one.kv_usage_ratio() == pytest.approx(2 * 11 / 100)


def test_tens_of_thousands_of_sequences_can_wait() -> None:
    one = scheduler(LaneSpec("bulk", 2, 64))
    add_all(one, (sequence(i, arrival_s=i) for i in range(20_000)))

    for _ in range(20):
        run(one)

    assert one.num_waiting + one.num_running > 19_900


def test_a_sequence_that_no_lane_holds_is_a_mistake_of_admission() -> None:
    one = scheduler(LaneSpec("bulk", 1, 64))

    with pytest.raises(AssertionError, match="admission"):
        one.add(sequence(prompt=64))
