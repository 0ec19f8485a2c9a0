"""Names of jobs, and which row belongs to which job of an earlier start."""

from __future__ import annotations

import pytest
from tests.bulk.test_packing import pending

from shoal.bulk.found_jobs import FoundJobs
from shoal.bulk.job_names import JobName, new_run_id
from shoal.jobs import Handle


def test_a_name_is_read_back_and_is_a_job_id() -> None:
    name = JobName(new_run_id(), 0, 31, 2)

    assert JobName.parse(str(name)) == name
    assert Handle.parse(str(name)).job_id == str(name)


@pytest.mark.parametrize("job_id", ["", "3f2a", "bulk-3f2a-1-2", "bulk-xyz-1-2-3", "bulk-a-1-2-3x"])
def test_other_ids_are_no_names(job_id: str) -> None:
    assert JobName.parse(job_id) is None


def test_a_row_is_in_the_latest_attempt_that_covers_it() -> None:
    first, again = JobName("a", 0, 3, 1), JobName("a", 2, 2, 2)
    found = FoundJobs([first, again])
    rows = [pending(i) for i in range(1, 5)]

    taken = [found.take(row) for row in rows]

    assert taken == [True, True, True, False]
    assert [row.attempts for row in rows] == [1, 2, 1, 0]
    jobs = {job.name: job.rows for job in found.complete(5)}
    assert jobs == {first: [rows[0], None, rows[2]], again: [rows[1]]}


def test_a_job_is_handed_out_once_when_all_its_rows_are_read() -> None:
    found = FoundJobs([JobName("a", 0, 3, 1)])
    found.take(pending(0))

    assert found.complete(3) == []
    # Its last row is broken, so it never comes; that it was passed is enough.
    assert [job.name.last for job in found.complete(4)] == [3]
    assert found.complete(9) == []
