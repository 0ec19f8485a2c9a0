"""Messages over a real pipe."""

from __future__ import annotations

from multiprocessing.connection import Connection, Pipe
from typing import Any

import pytest

from shoal_worker.pipe import Inbox, Outbox

BIG = b"x" * 1_000_000  # More than a pipe holds.


def taken(inbox: Inbox[Any], num_messages: int) -> list[Any]:
    got: list[Any] = []
    while len(got) < num_messages:
        got += inbox.take(block=True)
    return got


def test_two_peers_that_both_send_much_before_they_read_do_not_block() -> None:
    here, there = Pipe()
    outboxes: list[Outbox[bytes]] = [Outbox(here), Outbox(there)]
    for outbox in outboxes:
        for _ in range(5):
            outbox.put(BIG)

    inboxes: list[Inbox[bytes]] = [Inbox(here, at_end=b""), Inbox(there, at_end=b"")]
    for inbox in inboxes:
        assert taken(inbox, 5) == [BIG] * 5


def test_who_waits_for_a_message_hears_of_the_end() -> None:
    here, there = Pipe()
    inbox: Inbox[str] = Inbox(here, at_end="gone")
    there.send("last")
    there.close()

    assert taken(inbox, 2) == ["last", "gone"]


def test_sending_to_nobody_is_no_error() -> None:
    here, there = Pipe()
    there.close()
    outbox: Outbox[str] = Outbox(here)

    outbox.put("lost")
    outbox.close(timeout_s=5)


def test_what_cannot_be_sent_fails_where_it_comes_from() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    here, _there = Pipe()
    outbox: Outbox[Any] = Outbox(here)

    with pytest.raises(RecursionError):
        outbox.put(deep)


def test_what_is_left_is_sent_before_closing() -> None:
    here, there = Pipe()
    outbox: Outbox[bytes] = Outbox(here)
    inbox: Inbox[bytes] = Inbox(there, at_end=b"")
    for _ in range(10):
        outbox.put(BIG)

    outbox.close(timeout_s=20)
    here.close()

    assert taken(inbox, 11) == [*[BIG] * 10, b""]


def test_a_message_that_cannot_be_read_ends_the_inbox_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    here, there = Pipe()
    connection: Connection[Any, Any] = there
    inbox: Inbox[str] = Inbox(here, at_end="gone")
    connection.send_bytes(b"no pickle")

    assert inbox.take(block=True) == ["gone"]
    assert "cannot be read" in caplog.text
