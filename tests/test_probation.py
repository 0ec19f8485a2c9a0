"""Finding the request that kills the engine."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shoal_worker.probation import LONELY_DEATHS, Probation, Suspect


def suspects(num: int, job_id: str = "job") -> list[Suspect]:
    return [Suspect(job_id, i) for i in range(num)]


def convict(probation: Probation, killers: set[Suspect]) -> tuple[list[Suspect], int]:
    """Run groups until nobody is under suspicion; who was convicted, after how many deaths."""
    convicted, num_deaths = [], 0
    while not probation.is_over:
        group = probation.next_group()
        assert group, "somebody must be next"
        assert probation.next_group() == [], "one group runs at a time"
        if killers & set(group):
            num_deaths += 1
            found = probation.engine_died()
            convicted += [found] if found else []
        else:
            for suspect in group:
                probation.clear(suspect.job_id, [suspect.request or 0])
    return convicted, num_deaths


def test_a_job_that_is_put_last_waits_for_all_others() -> None:
    probation = Probation()
    probation.begin([])
    probation.engine_died()
    probation.add_group([*suspects(2, "a"), *suspects(1, "b")])
    probation.add_group(suspects(1, "c"))

    probation.put_last("a")

    order = []
    while group := probation.next_group():
        order.append(group)
        for suspect in group:
            probation.clear(suspect.job_id, [suspect.request or 0])
    assert order == [suspects(1, "b"), suspects(1, "c"), suspects(2, "a")]


@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=5))
def test_exactly_the_killers_are_convicted(num: int, chosen: set[int]) -> None:
    killers = {Suspect("job", i) for i in chosen if i < num}
    probation = Probation()
    probation.begin(suspects(num))
    first = probation.engine_died()
    killed = [first] if first else []

    convicted, num_deaths = convict(probation, killers)

    assert set(killed + convicted) == killers
    assert num_deaths <= len(killers) * (math.ceil(math.log2(num)) + LONELY_DEATHS)


def test_a_death_by_chance_convicts_nobody() -> None:
    probation = Probation()
    probation.begin(suspects(1))

    assert probation.engine_died() is None
    assert convict(probation, set()) == ([], 0)


def test_results_that_came_before_the_death_clear_their_requests() -> None:
    probation = Probation()
    probation.begin(suspects(4))
    probation.clear("job", [0, 1, 2])

    assert probation.engine_died() is None
    assert probation.next_group() == [Suspect("job", 3)]


def test_a_whole_job_can_be_cleared_running_or_waiting() -> None:
    probation = Probation()
    probation.begin([*suspects(2, "a"), *suspects(2, "b")])
    probation.engine_died()
    assert probation.waiting_jobs == {"a", "b"}
    assert probation.next_group() == suspects(2, "a")
    assert probation.waiting_jobs == {"b"}

    probation.clear("b")
    probation.clear("a")

    assert probation.is_over


def test_a_job_whose_requests_cannot_be_told_apart_is_one_suspect() -> None:
    whole = Suspect("job", None)
    probation = Probation()
    probation.begin([whole])
    for _ in range(LONELY_DEATHS - 1):
        assert probation.engine_died() is None
        assert probation.next_group() == [whole]

    assert probation.engine_died() == whole
    assert probation.is_over


def test_added_groups_wait_their_turn() -> None:
    probation = Probation()
    probation.begin(suspects(1, "running"))
    probation.add_group(suspects(2, "a"))
    probation.add_group(suspects(2, "b"))
    assert probation.next_group() == []

    probation.clear("running")
    assert probation.next_group() == suspects(2, "a")
    probation.clear("a")
    assert probation.next_group() == suspects(2, "b")
