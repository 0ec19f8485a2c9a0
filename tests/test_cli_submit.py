"""submit, result, cancel and status against a scripted worker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result
from tests.conftest import wait_until
from tests.scripted_worker import ScriptedWorker

from shoal.cli.group import shoal
from shoal.client import Client
from shoal.status import live_workers, read_snapshot


@pytest.fixture
def worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedWorker]:
    monkeypatch.setenv("SHOAL_REDIS_URL", redis_url)
    with ScriptedWorker(redis_url) as worker:
        yield worker


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(shoal, arguments, input=stdin)


@pytest.mark.usefixtures("worker")
def test_submit_prints_prompt_and_completion() -> None:
    result = invoke("submit", "hello", "--seed", "7")

    assert result.exit_code == 0
    assert result.stdout == "hello said 5 7 0\n"
    assert result.stderr == ""


def test_sampling_options_reach_the_request(worker: ScriptedWorker) -> None:
    result = invoke(
        *("submit", "p", "--max-tokens", "3", "--temperature", "0", "--stop", "a", "--stop", "b"),
        *("--stop-token-ids", "5", "--logit-bias", "7=-1.5", "--ignore-eos", "--n", "2"),
        *("--deadline", "30", "--id", "mine", "--model", "m"),
    )

    (request,) = worker.seen
    assert result.exit_code == 0, result.output
    assert request.sampling.model_dump(exclude_defaults=True) == {
        "max_tokens": 3,
        "temperature": 0.0,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "logit_bias": {7: -1.5},
        "ignore_eos": True,
        "n": 2,
    }
    assert (request.deadline, request.id, request.model) == (30, "mine", "m")
    assert result.stdout == "[0] p said 1 None 0\n[1] p said 1 None 1\n"


def test_several_prompts_travel_together_and_come_back_in_order(worker: ScriptedWorker) -> None:
    result = invoke("submit", "-", "--json", stdin="a\n\nbb\r\nccc")

    results = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [one["prompt"] for one in results] == ["a", "bb", "ccc"]
    assert len({one["id"].partition(":")[0] for one in results}) == 1
    assert len(worker.seen) == 3


@pytest.mark.usefixtures("worker")
def test_stdin_that_is_no_text_is_refused_by_its_line() -> None:
    result = invoke("submit", "-", stdin=b"a\n\xff\n")

    assert result.exit_code == 2
    assert "line 2 of standard input is not UTF-8" in result.stderr


@pytest.mark.usefixtures("worker")
def test_what_failed_goes_to_stderr_and_the_rest_is_printed() -> None:
    result = invoke("submit", "fine", "FAIL now")

    assert result.exit_code == 3
    assert result.stdout.startswith("fine said")
    assert "scripted to fail" in result.stderr


@pytest.mark.usefixtures("worker")
def test_stream_prints_the_same_text() -> None:
    result = invoke("submit", "hello", "--stream", "--seed", "7")

    assert result.exit_code == 0
    assert result.stdout.split() == ["hello", "said", "5", "7", "0"]


@pytest.mark.usefixtures("worker")
def test_a_stream_that_fails_ends_with_3() -> None:
    result = invoke("submit", "FAIL", "--stream")

    assert result.exit_code == 3
    assert "scripted to fail" in result.stderr


@pytest.mark.usefixtures("worker")
def test_a_model_that_nobody_serves_is_refused_before_anything_is_sent() -> None:
    result = invoke("submit", "p", "--model", "other")

    assert result.exit_code == 2
    assert "shoal-default is served with m, not with other" in result.stderr


def test_a_job_left_behind_is_fetched_by_its_id(worker: ScriptedWorker) -> None:
    worker.released.set()
    left = invoke("submit", "one HOLD", "two", "--no-wait")
    job_id, _, _index = left.stdout.splitlines()[0].partition(":")

    one = invoke("result", f"{job_id}:1")
    whole = invoke("result", job_id, "--json", "--timeout", "20")
    beyond = invoke("result", f"{job_id}:9")

    assert left.exit_code == one.exit_code == whole.exit_code == 0
    assert one.stdout.startswith(" said 3 ")
    assert len(whole.stdout.splitlines()) == 2
    assert beyond.exit_code == 2


@pytest.mark.usefixtures("worker")
def test_a_result_that_does_not_come_in_time_is_124_and_names_the_job() -> None:
    result = invoke("submit", "HOLD", "--timeout", "0.1")

    assert result.exit_code == 124
    assert "it goes on: shoal result " in result.stderr


def test_a_result_is_waited_for(worker: ScriptedWorker) -> None:
    job_id = invoke("submit", "HOLD", "--no-wait").stdout.strip()

    too_early = invoke("result", job_id, "--timeout", "0.1")
    worker.released.set()
    in_time = invoke("result", job_id, "--timeout", "20")

    assert too_early.exit_code == 124
    assert in_time.exit_code == 0


@pytest.mark.usefixtures("worker")
def test_a_cancelled_job_stays_cancelled() -> None:
    job_id = invoke("submit", "HOLD", "--no-wait").stdout.strip()

    first = invoke("cancel", job_id)
    second = invoke("cancel", job_id)
    result = invoke("result", job_id)

    assert (first.exit_code, first.stdout) == (0, f"cancelled {job_id}\n")
    assert (second.exit_code, second.stdout) == (0, f"{job_id} had ended before: canceled\n")
    assert result.exit_code == 3
    assert "was cancelled" in result.stderr


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("command", ["result", "cancel"])
def test_a_job_that_is_not_there_is_one_line_and_3(command: str) -> None:
    result = invoke(command, "0123abcd")

    assert result.exit_code == 3
    assert "no job 0123abcd" in result.stderr
    assert result.stderr.count("\n") == 1


def test_waiting_without_a_worker_says_so(redis_url: str) -> None:
    result = invoke("submit", "p", "--redis", redis_url, "--timeout", "0.1")

    assert result.exit_code == 124
    assert "no worker serves shoal-default yet" in result.stderr


def test_status_of_nothing_is_kind(redis_url: str) -> None:
    result = invoke("status", "--redis", redis_url)

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "The queues are empty.",
        "No worker is running. Start one: shoal worker --model demo",
    ]


def test_status_tells_of_queues_workers_and_failures(worker: ScriptedWorker) -> None:
    invoke("submit", "secret JOBFAIL")
    with Client() as client:
        client.submit("waits", queue="elsewhere")

        snapshot = read_snapshot(client.redis)

    shown = invoke("status")
    record = json.loads(invoke("status", "--json").stdout)
    queues = {queue.name: queue for queue in snapshot.queues}
    assert [queue.name for queue in snapshot.queues][:3] == [
        "shoal-high",
        "shoal-default",
        "shoal-bulk",
    ]
    assert queues["elsewhere"].depth == 1
    assert 0 <= (queues["elsewhere"].oldest_age_s or 0.0) < 20
    assert queues["shoal-default"].registries["failed"] == 1
    assert snapshot.failures[0].reason == "ValueError: scripted to fail"
    assert snapshot.workers[0].model == "m"
    assert snapshot.workers[0].tokens_per_s == 12.5
    assert record["workers"][0]["padding_ratio"] == 0.25
    assert record["workers"][0]["alive"]
    assert "ValueError: scripted to fail" in shown.stdout
    assert "secret" not in shown.stdout
    assert "0/8" in shown.stdout


def test_a_worker_whose_process_is_gone_serves_nothing(worker: ScriptedWorker) -> None:
    old = "2020-01-01T00:00:00.000000Z"
    worker.redis.hset(worker.key, mapping={"pid": 2**22 + 1, "last_heartbeat": old})

    assert live_workers(worker.redis) == []
    assert "gone" in invoke("status").stdout


def test_status_reads_and_changes_nothing(worker: ScriptedWorker, redis_url: str) -> None:
    invoke("submit", "JOBFAIL")
    wait_until(lambda: worker.redis.zcard("rq:failed:shoal-default") == 1, "the job has failed")
    worker.redis.zadd("rq:wip:shoal-default", {"gone:1": 1})
    before = {key: worker.redis.dump(key) for key in worker.redis.keys()}  # noqa: SIM118

    invoke("status")

    assert {key: worker.redis.dump(key) for key in worker.redis.keys()} == before  # noqa: SIM118
