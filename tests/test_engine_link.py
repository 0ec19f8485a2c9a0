"""The worker's end of the engine, with a process that dies on command."""

from __future__ import annotations

import pytest
from tests.scripted_engine import READY

from shoal_worker.engine_link import MAX_RESTARTS, EngineFailedError, EngineLink
from shoal_worker.messages import FromEngine, LoadFailed, Observed, Ready, Shutdown, ToEngine


class FakeProcess:
    """Says what it was given, then dies."""

    def __init__(self, says: list[FromEngine]) -> None:
        self._says = says
        self.is_alive = True
        self.sent: list[ToEngine] = []

    def receive(self, timeout_s: float) -> list[FromEngine]:
        if not self._says:
            self.is_alive = False
            raise EOFError
        said, self._says = self._says, []
        return said

    def send(self, message: ToEngine) -> None:
        if not self.is_alive:
            raise BrokenPipeError
        self.sent.append(message)

    def exit_text(self) -> str:
        return "was killed by SIGSEGV"

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


def test_an_engine_that_keeps_dying_is_given_up() -> None:
    lives: list[list[FromEngine]] = [[READY] for _ in range(MAX_RESTARTS + 1)]
    link = link_over(*lives)
    for _ in range(MAX_RESTARTS):
        link.receive(0)
        assert link.receive(0) is None
    link.receive(0)

    with pytest.raises(EngineFailedError, match="SIGSEGV"):
        link.receive(0)


@pytest.mark.parametrize(
    ("says", "reason"), [([LoadFailed("no such model")], "no such model"), ([], "SIGSEGV")]
)
def test_an_engine_that_cannot_load_is_not_tried_again(says: list[FromEngine], reason: str) -> None:
    with pytest.raises(EngineFailedError, match=reason):
        link_over(says).receive(0)


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


def test_a_silent_engine_with_work_is_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    link = link_over([READY, Observed(())])
    link.receive(0)
    monkeypatch.setattr("shoal_worker.engine_link.SILENT_S", 0.0)

    assert link.trouble(has_work=False) is None
    assert "silent for 0 s" in str(link.trouble(has_work=True))


def test_ready_carries_what_status_shows() -> None:
    assert isinstance(READY, Ready)
    assert READY.num_slots == sum(READY.lanes.values())
