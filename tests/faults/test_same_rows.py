"""The same bytes for one worker or three, in any company, order, and through any kill."""

from __future__ import annotations

import pytest
from tests.faults.same_rows import Options, Report, run
from tests.faults.server import require_server


@pytest.mark.timeout(600)  # Nine starts of a worker and ten of a command; some wait for a lease.
def test_rows_are_the_same_whatever_happens() -> None:
    require_server()

    report = run(
        Options(rows=80, max_tokens=12, kill_s=1.0, worker_kills=1, producer_kills=2, redis_kills=1)
    )

    print(report.table())
    assert report.violations() == []
    assert len(report.digests) == 7


def test_a_report_sees_rows_that_differ_and_faults_that_never_happened() -> None:
    report = Report(1, {"a": "1", "b": "2"}, {"a": "1", "b": "1"}, {"b": 0})

    assert report.violations() == ["the rows differ", "b: never happened"]
