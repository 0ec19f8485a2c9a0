"""Who serves a queue, when a command starts a worker of its own, and how progress looks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.scripted_worker import ScriptedWorker

from shoal.bulk.run_state import RunState
from shoal.cli import progress, serving
from shoal.cli.exits import Interrupted, signals_kept
from shoal.cli.serving import Serving
from shoal.cli.status import _rendered
from shoal.client import Client
from shoal.errors import InvalidRequest, ShoalError
from shoal.status import Snapshot

HALFWAY = RunState(
    run_id="a",
    status="running",
    output="out.jsonl",
    queue="q",
    rows_total=10,
    rows_done=5,
    rows_failed=1,
    workers=3,
    tokens_per_s=60.0,
    mean_tokens_per_s=50.0,
    padding_ratio=0.25,
    limit_ratio=0.94,
    eta_s=8.0,
)


def test_two_runs_of_one_name_are_told_apart_by_their_ids() -> None:
    runs = (HALFWAY, replace(HALFWAY, run_id="b"), replace(HALFWAY, output="other.jsonl"))
    console = Console(width=200)

    with console.capture() as captured:
        console.print(_rendered(Snapshot((), (), (), runs), console))

    shown = captured.get()
    assert [name in shown for name in ("out.jsonl (a)", "out.jsonl (b)")] == [True, True]
    assert "other.jsonl (" not in shown


class FakeLocalWorker:
    """Notes what is asked of it."""

    made: list[FakeLocalWorker] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(
        self, model: str, redis_url: str, queues: Sequence[str], folder: Path, name: str
    ) -> None:
        self.queues = tuple(queues)
        self.calls: list[str] = []
        self.is_dead = False
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def wait_ready(self) -> None:
        self.calls.append("wait_ready")

    def tell_to_stop(self) -> None:
        self.calls.append("tell_to_stop")

    def stop(self) -> None:
        self.calls.append("stop")

    def check(self) -> None:
        if self.is_dead:
            raise ShoalError("it has died")


@pytest.fixture
def embedded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that takes its Redis for the embedded one, looks each time, and starts fakes."""
    FakeLocalWorker.made.clear()
    monkeypatch.setattr(serving, "LocalWorker", FakeLocalWorker)
    monkeypatch.setattr(serving, "WATCH_INTERVAL_S", 0.0)
    with Client(redis_url) as client:
        client.is_embedded = True
        yield client


def test_a_worker_is_started_when_the_one_that_served_has_left(
    embedded: Client, redis_url: str
) -> None:
    with (
        ScriptedWorker(redis_url, ("shoal-bulk",)) as worker,
        Serving(embedded, "shoal-bulk", worker.model) as found,
    ):
        found.watch()
        assert FakeLocalWorker.made == []
        worker.redis.delete(worker.key)
        found.watch()

    (local,) = FakeLocalWorker.made
    assert local.calls == ["start", "wait_ready", "tell_to_stop", "stop"]


def test_a_worker_of_other_queues_does_not_count(embedded: Client, redis_url: str) -> None:
    with ScriptedWorker(redis_url, ("shoal-bulk",)), Serving(embedded, "mine", "m"):
        (local,) = FakeLocalWorker.made

    assert local.queues == ("shoal-high", "shoal-default", "shoal-bulk", "mine")


def test_the_death_of_an_own_worker_is_an_error(embedded: Client) -> None:
    with Serving(embedded, "shoal-bulk", "m") as found:
        FakeLocalWorker.made[0].is_dead = True

        with pytest.raises(ShoalError, match="it has died"):
            found.watch()


def test_without_a_model_no_worker_can_be_started(embedded: Client) -> None:
    with pytest.raises(InvalidRequest, match="--model demo"), Serving(embedded, "q", None):
        pass


def test_a_model_is_asked_for_by_the_name_it_is_served_under(
    embedded: Client, redis_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with ScriptedWorker(redis_url, ("q",), "mine"):
        with Serving(embedded, "q", str(folder)) as found:
            assert found.requested_model() == "mine"
            assert found.num_slots == 8
        with (
            Serving(embedded, "q", "other") as found,
            pytest.raises(InvalidRequest, match="q is served with mine, not with other"),
        ):
            found.requested_model()


def test_own_workers_of_another_kind_than_a_run_s_end_it(embedded: Client, redis_url: str) -> None:
    with Serving(embedded, "shoal-bulk", "m") as found:
        with ScriptedWorker(redis_url, fingerprint="mine"):
            found.watch()
            found.require_kind("mine")
            with pytest.raises(ShoalError, match=r"fingerprint first, .*\(there: mine\); --mixed"):
                found.require_kind("first")
        found.watch()
        found.require_kind("first")  # Nobody serves just now: that is told elsewhere.


def test_a_bar_shows_rows_speed_padding_and_time_left() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)

    with progress.display_for(screen) as display:
        display.show(HALFWAY)

    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "5/10" in shown
    for words in ("60 tokens/s (mean 50)", "padding 25.0%", "3 workers", "1 failed", "8.0 s left"):
        assert words in shown


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.display_for(Console(file=io.StringIO())) as display:
        display.show(HALFWAY)
        monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
        display.show(HALFWAY)

    assert capsys.readouterr().err == (
        "shoal: 5 of 10 rows, 60 tokens/s (mean 50), padding 25.0%, 3 workers, 1 failed, "
        "94% ended by max_tokens, 8.0 s left\n"
    )


def test_a_second_signal_does_not_wait() -> None:
    with signals_kept() as stop:
        stop.receive(15, None)
        assert stop()

        with pytest.raises(Interrupted):
            stop.receive(2, None)
