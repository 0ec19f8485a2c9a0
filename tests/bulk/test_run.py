"""Whole bulk runs against a scripted worker: order, errors, resume, limits."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until
from tests.scripted_worker import FINGERPRINT, ScriptedWorker

from shoal.bulk import run as run_module
from shoal.bulk.folder import OutputLocked, RunFolder
from shoal.bulk.manifest import Manifest, load
from shoal.bulk.outcomes import results_of
from shoal.bulk.plan import Limits, MaxFailures, Plan, Progress, Workers
from shoal.bulk.run import BulkRun, Ending
from shoal.bulk.seeds import row_seed
from shoal.bulk.window import Window
from shoal.bulk.writer import OrderedWriter
from shoal.client import Client
from shoal.errors import InvalidRequest, QueueFull, RedisUnavailable
from shoal.job_states import JobState
from shoal.wire import QUEUE_BULK

LIMITS = Limits(max_in_flight=64, timeout_s=30)


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def worker(redis_url: str) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_url) as worker:
        yield worker


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write_input(tmp_path: Path, records: list[Any], name: str = "in.jsonl") -> Path:
    path = tmp_path / name
    texts = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def prompts(number: int) -> list[Any]:
    return [{"prompt": f"prompt {i}"} for i in range(number)]


def never() -> bool:
    return False


def ignore(_progress: Progress) -> None:
    pass


def generate(
    client: Client,
    plan: Plan,
    limits: Limits = LIMITS,
    stop: Callable[[], bool] = never,
    on_turn: Callable[[Progress], None] = ignore,
) -> tuple[Ending, BulkRun]:
    with BulkRun.locked(plan) as run:
        return run.generate(client, QUEUE_BULK, limits, stop=stop, on_turn=on_turn), run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def errors(output: Path) -> list[dict[str, Any]]:
    return rows(RunFolder(output).errors)


def manifest(output: Path) -> Manifest:
    found = load(RunFolder(output).manifest)
    assert found is not None
    return found


def test_rows_come_out_in_input_order_whatever_order_they_end_in(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = prompts(300)
    records[3]["prompt"] += " HOLD"
    source = write_input(tmp_path, records)

    def release(progress: Progress) -> None:
        # Nothing behind the held row is written, however much of it has ended.
        assert worker.released.is_set() or progress.rows_done <= 3
        if len(worker.seen) == len(records):
            worker.released.set()

    limits = Limits(max_in_flight=1_000, timeout_s=30)
    ending, run = generate(client, Plan(source, output), limits, on_turn=release)

    found = rows(output)
    assert ending == "complete"
    assert [row["index"] for row in found] == list(range(300))
    assert [row["seed"] for row in found] == [row_seed(0, i) for i in range(300)]
    assert found[5]["text"] == f" said 8 {row_seed(0, 5)} 0"
    assert run.progress().completion_tokens == 300 * 16


def test_the_manifest_tells_the_run_and_its_digests(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    source = write_input(tmp_path, prompts(5))

    generate(client, Plan(source, output, {"max_tokens": 3}, seed=9, model="m"))

    found = manifest(output)
    assert found.complete
    assert (found.rows_done, found.rows_failed, found.completions) == (5, 0, 5)
    assert found.input.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found.file_sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert found.fingerprint == FINGERPRINT
    assert found.parameters.sampling["max_tokens"] == 3
    assert found.parameters.seed == 9


def test_what_cannot_be_generated_is_an_error_line_and_never_stops_the_run(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = [
        {"prompt": "a"},
        "{broken",
        {"prompt": "b", "max_tokns": 1},
        {"prompt": "TOOLONG", "id": "long"},
        {"prompt": "FAIL"},
        {"prompt": "FLAKY", "n": 2},
        {"prompt": "c", "metadata": {"kept": True}},
    ]

    ending, run = generate(client, Plan(write_input(tmp_path, records), output))

    assert ending == "complete"
    assert [(row["index"], row["sample"]) for row in rows(output)] == [
        (0, 0),
        (5, 0),
        (5, 1),
        (6, 0),
    ]
    found = errors(output)
    assert [(one["index"], one["line"], one["id"]) for one in found] == [
        (1, 2, "1"),
        (2, 3, "2"),
        (3, 4, "long"),
        (4, 5, "4"),
    ]
    assert [one["attempts"] for one in found] == [0, 0, 1, 1]
    assert found[2]["error"]["code"] == "prompt_too_long"
    assert "max_tokns" in found[1]["error"]["message"]
    assert run.progress().rows_failed == 4


def test_a_job_that_fails_as_a_whole_costs_only_the_row_that_fails_it(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = prompts(10)
    records[4]["prompt"] = "JOBFAIL"

    generate(client, Plan(write_input(tmp_path, records), output))

    assert [row["index"] for row in rows(output)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    (failed,) = errors(output)
    assert (failed["index"], failed["attempts"], failed["error"]["code"]) == (4, 2, "job_failed")


def test_jobs_that_somebody_cancels_are_error_lines(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    source = write_input(tmp_path, [{"prompt": "HOLD"}, {"prompt": "HOLD 2"}])

    def cancel(_progress: Progress) -> None:
        for key in client.redis.scan_iter("rq:job:*"):
            client.job(key.decode().removeprefix("rq:job:")).cancel()

    ending, _run = generate(client, Plan(source, output), on_turn=cancel)

    assert ending == "complete"
    assert [one["error"]["code"] for one in errors(output)] == ["cancelled", "cancelled"]


def test_an_answer_to_other_requests_is_no_answer() -> None:
    value = base64.b64encode(json.dumps({"v": 1, "results": []}).encode())
    state = JobState("finished", entry={b"return_value": value})

    (result,) = results_of(state, "j", ["row"])

    assert result.error is not None
    assert (result.id, result.error.code) == ("row", "bad_result")


def test_the_errors_of_a_run_are_the_input_of_another_with_the_same_seeds(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    source = write_input(tmp_path, [{"prompt": "a"}, {"prompt": "b", "max_tokens": 0, "id": "x"}])
    generate(client, Plan(source, output))
    mended = tmp_path / "mended.jsonl"
    lines = RunFolder(output).errors.read_text()
    mended.write_text(lines.replace('"max_tokens": 0', '"max_tokens": 2'))
    second = tmp_path / "second.jsonl"

    ending, _run = generate(client, Plan(mended, second))

    (row,) = rows(second)
    assert ending == "complete"
    assert (row["index"], row["id"], row["prompt"], row["seed"]) == (1, "x", "b", row_seed(0, 1))


def test_nothing_of_a_run_is_left_in_redis(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    generate(client, Plan(write_input(tmp_path, prompts(100)), output))

    assert client.redis.keys("rq:job:*") == []
    assert client.redis.keys("rq:results:*") == []
    assert client.redis.keys("rq:finished:*") == []


def nothing_is_queued(client: Client) -> bool:
    keys = list(client.redis.scan_iter("rq:job:*"))
    return all(client.redis.hget(key, "status") != b"queued" for key in keys)


def test_a_stopped_run_finds_again_what_was_begun_and_what_has_ended(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = prompts(200)
    records[40]["prompt"] += " HOLD"
    plan = Plan(write_input(tmp_path, records), output)
    seen: list[int] = []

    ending, run = generate(
        client,
        plan,
        # Begun, not only taken from the queue: what is between the two may be taken back.
        stop=lambda: len(worker.seen) == 200,
        on_turn=lambda progress: seen.append(progress.rows_done),
    )

    assert ending == "interrupted"
    assert 36 <= run.progress().rows_done <= 40
    assert not manifest(output).complete
    worker.released.set()

    ending, run = generate(client, plan)

    assert ending == "complete"
    assert [row["index"] for row in rows(output)] == list(range(200))
    assert len(worker.seen) == 200
    assert manifest(output).file_sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert client.redis.keys("rq:*bulk*") == []


def test_a_stopped_run_takes_back_what_no_worker_has_begun(
    client: Client, tmp_path: Path, output: Path
) -> None:
    plan = Plan(write_input(tmp_path, prompts(100)), output)

    generate(client, plan, stop=iter([False, False, True]).__next__)

    assert client.redis.keys("rq:job:*") == []
    assert nothing_is_queued(client)


def test_a_run_that_stops_with_its_own_workers_takes_back_what_they_have_begun(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    plan = Plan(write_input(tmp_path, [{"prompt": f"HOLD {i}"} for i in range(20)]), output)

    with BulkRun.locked(plan) as run:
        run.generate(
            client,
            QUEUE_BULK,
            LIMITS,
            stop=lambda: len(worker.seen) == 20,
            on_turn=ignore,
            workers=lambda: Workers(are_own=True),
        )

    assert client.redis.keys("rq:job:*") == []


def killed(
    client: Client,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    is_time: Callable[[Progress], bool],
) -> None:
    """A run that ends as one that is killed: it takes nothing back, and deletes nothing more."""

    def die(progress: Progress) -> None:
        if is_time(progress):
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(Window, "leave", lambda *_args, **_options: None)
        patch.setattr(OrderedWriter, "sync_if_due", lambda *_args: None)
        with pytest.raises(EOFError):
            generate(client, plan, on_turn=die)


def test_a_killed_run_generates_nothing_anew(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = prompts(300)
    for index in (10, 11, 70):
        records[index] = "{broken"
    records[30]["n"] = 3
    records[31]["prompt"] = "FLAKY"
    plan = Plan(write_input(tmp_path, records), output)
    killed(client, plan, monkeypatch, lambda progress: progress.rows_done >= 60)
    with output.open("r+b") as file:
        # Mid-row, mid-job: what the page cache held of it is gone.
        file.truncate(output.stat().st_size // 2 + 7)

    ending, _run = generate(client, plan)

    assert ending == "complete"
    indexes = [row["index"] for row in rows(output) if row["sample"] == 0]
    assert indexes == [i for i in range(300) if i not in {10, 11, 70}]
    assert len(worker.seen) == 297 + 1  # The flaky row once more.
    assert client.redis.keys("rq:*bulk*") == []


def test_a_run_killed_before_its_first_row_was_written_goes_on_too(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(write_input(tmp_path, prompts(50)), output)
    killed(client, plan, monkeypatch, lambda _progress: True)

    ending, _run = generate(client, plan)

    assert ending == "complete"
    assert len(worker.seen) == 50


@pytest.mark.parametrize("mixed", [False, True])
def test_jobs_found_again_stay_bound_unless_the_run_goes_on_mixed(
    client: Client,
    redis_url: str,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixed: bool,
) -> None:
    source = write_input(tmp_path, prompts(200))
    first = ScriptedWorker(redis_url, fingerprint="first").__enter__()
    first.released.set()

    def bound_jobs_wait(progress: Progress) -> bool:
        # By then all that was sent before the first answer, and bound to nobody, has ended.
        if progress.rows_done > LIMITS.max_in_flight and not first.stopped.is_set():
            first.__exit__(None, None, None)
        return first.stopped.is_set() and bool(waiting_jobs(client))

    killed(client, Plan(source, output), monkeypatch, bound_jobs_wait)
    plan = Plan(source, output, mixed=mixed)

    with ScriptedWorker(redis_url, fingerprint="other") as other:
        other.released.set()
        ending, _run = generate(
            client, plan, Limits(max_in_flight=64, timeout_s=30 if mixed else 1)
        )
        if not mixed:
            assert (ending, other.seen) == ("timed out", [])
            with ScriptedWorker(redis_url, fingerprint="first") as again:
                again.released.set()
                ending, _run = generate(client, plan)

    assert ending == "complete"
    kinds = {"first", "other"} if mixed else {"first"}
    assert {row["fingerprint"] for row in rows(output)} == kinds
    assert client.redis.keys("rq:*bulk*") == []


@pytest.mark.parametrize("change", [{"overwrite": True}, {"seed": 1}])
def test_a_run_that_takes_the_place_of_another_takes_back_its_jobs(
    client: Client,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    source = write_input(tmp_path, prompts(50))
    killed(client, Plan(source, output), monkeypatch, lambda _progress: True)
    old: list[Any] = list(client.redis.scan_iter("rq:job:*"))

    generate(client, Plan(source, output, **change), stop=lambda: True)

    assert old
    assert client.redis.exists(*old) == 0


def test_a_file_torn_anywhere_is_made_whole_again(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = prompts(6)
    records[2]["n"] = 3
    records[4]["prompt"] = "FAIL"
    plan = Plan(write_input(tmp_path, records), output)
    generate(client, plan)
    whole, error_lines = output.read_bytes(), RunFolder(output).errors.read_bytes()
    chance = random.Random(0)
    for _ in range(40):
        output.write_bytes(whole[: chance.randrange(len(whole))])
        RunFolder(output).errors.write_bytes(error_lines[: chance.randrange(len(error_lines) + 1)])

        ending, run = generate(client, plan)

        assert ending == "complete"
        assert output.read_bytes() == whole
        assert RunFolder(output).errors.read_bytes() == error_lines
        assert run.manifest.rows_failed == 1


def test_a_complete_run_has_nothing_left(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    plan = Plan(write_input(tmp_path, [*prompts(3), "{broken"]), output)
    generate(client, plan)
    before = output.read_bytes(), RunFolder(output).errors.read_bytes()

    with BulkRun.locked(plan) as run:
        assert not run.has_rows_left
        run.finish()

    assert (output.read_bytes(), RunFolder(output).errors.read_bytes()) == before
    assert manifest(output).complete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": {"max_tokens": 5}}, r"max_tokens 16 \(now 5\)"),
        ({"seed": 4}, r"seed 0 \(now 4\)"),
        ({"limit": 2}, r"limit null \(now 2\)"),
        ({"model": "n"}, r'model "m" \(now "n"\)'),
    ],
)
def test_other_parameters_are_refused_by_name(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    change: dict[str, Any],
    words: str,
) -> None:
    source = write_input(tmp_path, prompts(3))
    given: dict[str, Any] = {"model": "m"}
    generate(client, Plan(source, output, **given))

    with pytest.raises(InvalidRequest, match=words):
        BulkRun.begin(Plan(source, output, **(given | change)))


def test_a_run_that_goes_on_without_a_model_keeps_the_one_it_was_begun_with(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    source = write_input(tmp_path, [*prompts(40), {"prompt": "HOLD"}])
    turns = iter(range(3))
    generate(client, Plan(source, output, model="m"), stop=lambda: next(turns, None) is None)
    worker.released.set()

    with BulkRun.locked(Plan(source, output)) as run:
        assert run.model == "m"
        run.generate(client, QUEUE_BULK, LIMITS, stop=never, on_turn=ignore)

    assert manifest(output).parameters.model == "m"
    with pytest.raises(InvalidRequest, match='model "m"'):
        BulkRun.begin(Plan(source, output, model="n"))


def begun(client: Client, worker: ScriptedWorker, plan: Plan) -> None:
    """A run of this plan, stopped after its first rows: a later row has HOLD."""
    seen: list[int] = []

    def note_rows(progress: Progress) -> None:
        seen.append(progress.rows_done)

    generate(client, plan, stop=lambda: any(seen), on_turn=note_rows)


def waiting_jobs(client: Client) -> list[dict[str, Any]]:
    """What the jobs that have not ended tell of themselves."""
    keys: Any = client.redis.keys("rq:job:*")
    with client.redis.pipeline() as pipeline:
        for key in keys:
            pipeline.hmget(key, "status", "meta")
        jobs = pipeline.execute()
    return [json.loads(meta) for status, meta in jobs if status in {b"queued", b"started"}]


def test_a_run_that_goes_on_is_bound_to_the_kind_of_worker_that_began_it(
    client: Client, redis_url: str, tmp_path: Path, output: Path
) -> None:
    plan = Plan(write_input(tmp_path, [*prompts(100), {"prompt": "HOLD"}]), output)
    with ScriptedWorker(redis_url, fingerprint="first") as worker:
        begun(client, worker, plan)
    path = RunFolder(output).manifest
    path.write_text(path.read_text().replace('"fingerprint": "first"', '"fingerprint": null'))

    with ScriptedWorker(redis_url, fingerprint="other") as other:
        other.released.set()
        ending, run = generate(client, plan, Limits(max_in_flight=64, timeout_s=0.5))
        assert (ending, other.seen, run.fingerprint) == ("timed out", [], "first")
        with ScriptedWorker(redis_url, fingerprint="first") as first:
            first.released.set()
            ending, run = generate(client, plan)

    assert ending == "complete"
    assert {row["fingerprint"] for row in rows(output)} == {"first"}


def test_a_mixed_run_takes_any_worker(
    client: Client, redis_url: str, tmp_path: Path, output: Path
) -> None:
    source = write_input(tmp_path, [*prompts(100), {"prompt": "HOLD"}])
    with ScriptedWorker(redis_url, fingerprint="first") as worker:
        begun(client, worker, Plan(source, output))

    with ScriptedWorker(redis_url, fingerprint="other") as other:
        other.released.set()
        ending, run = generate(client, Plan(source, output, mixed=True))

    assert (ending, run.fingerprint) == ("complete", None)
    assert {row["fingerprint"] for row in rows(output)} == {"first", "other"}


def test_the_first_answer_binds_all_further_jobs(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = [*prompts(100), {"prompt": "HOLD"}]
    last: list[Any] = []

    def look(progress: Progress) -> None:
        if progress.rows_done > 90 and not worker.released.is_set():
            last[:] = [meta.get("fingerprint") for meta in waiting_jobs(client)]
            worker.released.set()

    ending, _run = generate(client, Plan(write_input(tmp_path, records), output), on_turn=look)

    assert ending == "complete"
    assert set(last) == {FINGERPRINT}


def test_rows_that_another_kind_answered_before_the_run_was_bound_are_made_anew(
    client: Client, redis_url: str, tmp_path: Path, output: Path
) -> None:
    with (
        ScriptedWorker(redis_url, fingerprint="one") as one,
        ScriptedWorker(redis_url, fingerprint="two") as two,
    ):
        records = [{"prompt": f"HOLD {i}"} for i in range(40)]

        def release(_progress: Progress) -> None:
            if len(one.seen) + len(two.seen) >= 40:
                one.released.set()
                two.released.set()

        ending, _run = generate(
            client, Plan(write_input(tmp_path, records), output), on_turn=release
        )

        assert ending == "complete"
        assert one.seen
        assert two.seen
    assert len({row["fingerprint"] for row in rows(output)}) == 1
    assert [row["index"] for row in rows(output)] == list(range(40))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 2', r"version 2; this Shoal reads version 1: go on with the"),
        ('"version": 1,', "", r"version null; this Shoal reads version 1"),
        ('"sha256"', '"sha"', r"input.sha256 is missing or wrong; --overwrite starts anew"),
        ("{", "", r"not readable as a manifest: .*; --overwrite starts anew"),
    ],
)
def test_a_manifest_of_another_version_is_refused_with_what_to_do(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    old: str,
    new: str,
    words: str,
) -> None:
    plan = Plan(write_input(tmp_path, prompts(1)), output)
    generate(client, plan)
    path = RunFolder(output).manifest
    path.write_text(path.read_text().replace(old, new, 1))

    with pytest.raises(InvalidRequest, match=words):
        BulkRun.begin(plan)


def test_another_input_is_refused_unless_the_output_is_overwritten(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    generate(client, Plan(write_input(tmp_path, prompts(3)), output))
    other = write_input(tmp_path, prompts(2), "other.jsonl")

    with pytest.raises(InvalidRequest, match=r"another input \(.*in.jsonl, 3 rows\)"):
        BulkRun.begin(Plan(other, output))
    ending, _run = generate(client, Plan(other, output, overwrite=True))

    assert ending == "complete"
    assert len(rows(output)) == 2


def test_a_file_that_no_run_wrote_is_not_touched(tmp_path: Path, output: Path) -> None:
    output.write_text("precious\n")
    plan = Plan(write_input(tmp_path, prompts(1)), output)

    with pytest.raises(InvalidRequest, match="no bulk run wrote it"):
        BulkRun.begin(plan)

    assert output.read_text() == "precious\n"


def test_rows_added_to_a_complete_output_are_not_cut_off(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    plan = Plan(write_input(tmp_path, prompts(1)), output)
    generate(client, plan)
    with output.open("a") as file:
        file.write("precious\n")

    with pytest.raises(InvalidRequest, match="was complete"):
        BulkRun.begin(plan)


def test_a_run_that_never_began_binds_nothing(tmp_path: Path, output: Path) -> None:
    source = write_input(tmp_path, prompts(1))
    with BulkRun.locked(Plan(source, output)):
        pass

    assert BulkRun.begin(Plan(source, output, seed=5)).has_rows_left


def test_an_output_is_written_by_one_run_at_a_time(tmp_path: Path, output: Path) -> None:
    plan = Plan(write_input(tmp_path, prompts(1)), output)

    with (
        BulkRun.locked(plan),
        pytest.raises(OutputLocked, match="another run"),
        BulkRun.locked(plan),
    ):
        pass


def test_a_run_stops_when_too_many_rows_have_failed(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = [{"prompt": "FAIL"}, {"prompt": "FAIL"}, *prompts(500)]
    limits = Limits(max_in_flight=32, max_failures=MaxFailures(number=1))

    ending, run = generate(client, Plan(write_input(tmp_path, records), output), limits)

    assert ending == "too many failures"
    assert run.progress().rows_done < 500


def test_a_run_stops_when_its_time_is_up(client: Client, tmp_path: Path, output: Path) -> None:
    limits = Limits(max_in_flight=32, timeout_s=0.2)

    ending, _run = generate(client, Plan(write_input(tmp_path, prompts(3)), output), limits)

    assert ending == "timed out"
    assert client.redis.keys("rq:job:*") == []


def test_a_limit_is_the_first_rows(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    generate(client, Plan(write_input(tmp_path, prompts(10)), output, limit=4))

    assert [row["index"] for row in rows(output)] == [0, 1, 2, 3]


def test_no_more_is_in_flight_than_allowed(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = prompts(400)
    records[0]["prompt"] += " HOLD"
    counts: list[int] = []

    def count(_progress: Progress) -> None:
        counts.append(sum(meta["requests"] for meta in waiting_jobs(client)))
        if len(worker.seen) >= 300:
            worker.released.set()

    ending, _run = generate(
        client, Plan(write_input(tmp_path, records), output), LIMITS, on_turn=count
    )

    assert ending == "complete"
    assert 1 < max(counts) <= LIMITS.max_in_flight


def test_a_short_absence_of_redis_does_not_end_a_run(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    absences = iter([RedisUnavailable("away"), RedisUnavailable("away")])

    def fail_twice(_progress: Progress) -> None:
        if (error := next(absences, None)) is not None:
            raise error

    ending, _run = generate(
        client, Plan(write_input(tmp_path, prompts(3)), output), on_turn=fail_twice
    )

    assert ending == "complete"


def test_a_full_redis_is_emptied_before_it_is_filled(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = client.send

    def send_if_empty(jobs: Any) -> None:
        if client.redis.exists("rq:queue:shoal-bulk") or client.redis.keys("rq:results:*"):
            raise QueueFull("no room")
        send(jobs)

    monkeypatch.setattr(client, "send", send_if_empty)
    monkeypatch.setattr(run_module, "MAX_OUTAGE_S", 2.0)
    monkeypatch.setattr(run_module, "POLL_S", 0.05)
    limits = Limits(max_in_flight=64, timeout_s=20)

    ending, _run = generate(client, Plan(write_input(tmp_path, prompts(300)), output), limits)

    assert ending == "complete"
    assert len(worker.seen) == 300


def test_jobs_whose_reply_is_lost_are_not_made_anew(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = client.send
    lost = iter([RedisUnavailable("reply lost"), QueueFull("full half-way")])

    def send_and_lose(jobs: Any) -> None:
        error = next(lost, None)
        send(jobs[:1] if isinstance(error, QueueFull) else jobs)
        if error is not None:
            raise error

    monkeypatch.setattr(client, "send", send_and_lose)

    ending, _run = generate(client, Plan(write_input(tmp_path, prompts(100)), output))

    assert ending == "complete"
    assert len(worker.seen) == 100
    assert client.redis.keys("rq:job:*") == []


def test_results_are_kept_when_the_reply_to_their_deletion_is_lost(
    client: Client,
    worker: ScriptedWorker,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget = client.forget
    losses = iter([RedisUnavailable("reply lost")] * 2)

    def forget_and_lose(job_ids: Any, queue: str, **options: Any) -> None:
        forget(job_ids, queue, **options)
        if job_ids and (error := next(losses, None)) is not None:
            raise error

    monkeypatch.setattr(client, "forget", forget_and_lose)

    ending, _run = generate(client, Plan(write_input(tmp_path, prompts(100)), output))

    assert ending == "complete"
    assert len(worker.seen) == len(rows(output)) == 100
    assert client.redis.keys("rq:job:*") == []


def test_jobs_that_redis_lost_are_sent_again(
    client: Client, worker: ScriptedWorker, tmp_path: Path, output: Path
) -> None:
    records = [{"prompt": "HOLD"}, {"prompt": "HOLD too"}]
    losses = iter([client.redis.flushall])

    def lose_once(_progress: Progress) -> None:
        for lose in losses:
            wait_until(lambda: len(worker.seen) == 2, "the worker holds the job")
            lose()
            worker.released.set()

    ending, _run = generate(client, Plan(write_input(tmp_path, records), output), on_turn=lose_once)

    assert ending == "complete"
    assert len(rows(output)) == 2
