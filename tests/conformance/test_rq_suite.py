"""RQ's own tests pass with our lifecycle in the place of its claim and commit."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
import rq
from tests.conformance import suite

# What this release has, less what it skips by itself and what is deselected. One less is a defect:
# a file that is not collected any more, or tests that have begun to skip.
MIN_PASSED = 609
MAX_SKIPPED = 16


@pytest.fixture(scope="module")
def report(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> suite.Report:
    cache = request.config.cache
    assert cache is not None
    try:
        archive = suite.fetch(cache.mkdir("rq-release"))
    except suite.CannotFetch as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"RQ's release cannot be fetched: {error}")
    return suite.run(archive, tmp_path_factory.mktemp("rq"))


def files_run() -> set[str]:
    return {name for shard in suite.SHARDS for name in shard}


def test_the_tests_are_those_of_the_installed_rq() -> None:
    assert rq.__version__ == suite.VERSION


def test_no_test_of_rq_s_fails(report: suite.Report) -> None:
    assert report.failed == [], report.output


def test_no_test_of_rq_s_has_gone_missing(report: suite.Report) -> None:
    assert report.passed >= MIN_PASSED
    assert report.skipped <= MAX_SKIPPED


def test_every_file_had_jobs_claimed_through_the_lifecycle(report: suite.Report) -> None:
    files = {f"tests/test_{name}.py" for name in files_run()}

    assert {file for file, claimed in report.claimed.items() if claimed} == files


def test_every_test_is_run_or_left_out_for_a_reason(report: suite.Report) -> None:
    left_out = tomllib.loads(suite.DESELECTED.read_text())
    tests, files = left_out["deselected"], left_out["files"]

    assert files_run() | files.keys() == suite.test_files(report.archive)
    assert not files_run() & files.keys()
    assert all(reason.strip() for reason in (*tests.values(), *files.values()))
    assert report.deselected == len(tests)


def test_a_deselected_test_that_rq_does_not_have_fails_the_run(
    report: suite.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = tmp_path / "deselected.toml"
    unknown.write_text('[deselected]\n"tests/test_fixtures.py::test_gone" = "it is gone"\n')
    monkeypatch.setattr(suite, "DESELECTED", unknown)
    monkeypatch.setattr(suite, "SHARDS", (("fixtures",),))

    failed = suite.run(report.archive, tmp_path)

    assert "test_gone" in failed.output
    assert failed.failed


def test_another_archive_than_the_one_that_was_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"rq-{suite.VERSION}.tar.gz").write_bytes(b"something else")

    with pytest.raises(ValueError, match="sha256"):
        suite.fetch(tmp_path)
