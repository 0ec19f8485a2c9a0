"""The worker's end of the engine, with a process that dies on command."""

from __future__ import annotations

import pytest
from tests.fakes import FakeClock
from tests.scripted_engine import READY

from shoal_worker.engine_link import EngineFailedError, EngineLink
from shoal_worker.messages import Dying, FromEngine, LoadFailed, Ready, Shutdown, ToEngine


class FakeProcess:
    """Says what it was given, then dies."""

    def __init__(self, says: list[FromEngine], *, lives_on: bool = False) -> None:
        self._says = says
        self._lives_on = lives_on
        self.is_alive = True
        self.sent: list[ToEngine] = []

    def receive(self, timeout_s: float, wake: int | None = None) -> list[FromEngine]:
        if not self._says and self._lives_on:
            return []
        if not self._says:
            self.is_alive = False
            raise EOFError
        said, self._says = self._says, []
        return said

    def send(self, message: ToEngine) -> None:
        if not self.is_alive:
            return  # As from `EngineProcess`: what is sent to the dead is lost.
        self.sent.append(message)

    def exit_text(self) -> str:
        return "was killed by SIGSEGV"

    def kill(self) -> None:
        self.is_alive = False

    def stop(self) -> None:
        self.is_alive = False


def link_over(*lives: list[FromEngine]) -> EngineLink:
    processes = iter([FakeProcess(says) for says in lives])
    link = EngineLink(lambda: next(processes))  # type: ignore[arg-type, return-value]
    link.start()
    return link


def test_it_is_ready_once_the_engine_has_said_so() -> None:
    link = link_over([READY])
    assert link.ready is None

    assert link.receive(0) == [READY]

    assert link.ready == READY
    assert link.trouble(has_work=True) is None


def test_after_a_death_another_engine_loads() -> None:
    link = link_over([READY], [READY])
    link.receive(0)

    assert link.receive(0) is None

    assert link.ready is None
    assert link.receive(0) == [READY]
    assert link.ready == READY


def test_it_says_how_the_last_one_died_and_why() -> None:
    link = link_over([READY, Dying("RuntimeError: no memory")], [READY])
    link.receive(0)

    assert link.receive(0) is None

    assert link.last_death == "was killed by SIGSEGV (RuntimeError: no memory)"
    assert link.served == READY


@pytest.mark.parametrize(
    ("says", "reason"), [([LoadFailed("no such model")], "no such model"), ([], "SIGSEGV")]
)
def test_an_engine_that_cannot_load_is_not_tried_again(says: list[FromEngine], reason: str) -> None:
    with pytest.raises(EngineFailedError, match=reason):
        link_over(says).receive(0)


def test_one_that_served_before_may_die_twice_while_it_loads() -> None:
    link = link_over([READY], [], [], [READY], [], [], [])
    link.receive(0)
    assert [link.receive(0) for _ in range(3)] == [None, None, None]
    assert link.receive(0) == [READY]

    assert [link.receive(0) for _ in range(3)] == [None, None, None]
    with pytest.raises(EngineFailedError, match="before it was ready"):
        link.receive(0)


def test_telling_a_dead_engine_is_no_error_and_trouble_names_it() -> None:
    process = FakeProcess([READY])
    link = EngineLink(lambda: process)  # type: ignore[arg-type, return-value]
    assert link.trouble(has_work=False) == "the engine process is not running"
    link.start()
    link.tell(Shutdown())
    process.stop()

    link.tell(Shutdown())

    assert process.sent == [Shutdown()]
    assert link.trouble(has_work=False) == "the engine process is not running"


def silent_link(clock: FakeClock) -> tuple[EngineLink, list[FakeProcess]]:
    processes: list[FakeProcess] = []

    def start() -> FakeProcess:
        processes.append(FakeProcess([READY], lives_on=True))
        return processes[-1]

    link = EngineLink(start, hang_s=60, clock=clock)  # type: ignore[arg-type]
    link.start()
    link.receive(0)
    return link, processes


def test_an_engine_that_is_silent_with_work_in_hand_is_replaced() -> None:
    clock = FakeClock()
    link, processes = silent_link(clock)
    clock.now_s += 59
    assert link.receive(0, has_work=True) == []
    assert "silent for 59 s" in str(link.trouble(has_work=True))
    clock.now_s += 2

    assert link.receive(0, has_work=True) is None

    assert [process.is_alive for process in processes] == [False, True]
    assert "silent for 61 s" in link.last_death
    assert link.receive(0) == [READY]


def test_an_idle_engine_may_be_silent_and_so_may_one_that_has_just_got_work() -> None:
    clock = FakeClock()
    link, _processes = silent_link(clock)
    clock.now_s += 1_000

    assert link.receive(0) == []
    assert link.trouble(has_work=False) is None

    link.work_begins()
    assert link.receive(0, has_work=True) == []
    assert link.trouble(has_work=True) is None


def test_ready_carries_what_status_shows() -> None:
    assert isinstance(READY, Ready)
    assert READY.num_slots == sum(READY.lanes.values())
