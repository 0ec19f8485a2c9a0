"""Real workers with a real model on a real server: what a user of the whole path relies on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import wait_until
from tests.tiny_models import make_tiny_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import shoal_worker
from shoal import Cancelled, Client, InvalidRequest, ModelMismatch, PromptTooLong
from shoal_worker import Generator

DEMO = Path(shoal_worker.__file__).parent / "models" / "demo"
PROMPTS = Path(__file__).parents[2] / "ops" / "demo" / "prompts.txt"
LANES = "interactive=4x512,bulk=8x512"


@contextmanager
def serving(
    redis_url: str, *options: str, model: str = "demo", wait: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A `shoal worker` process; its first line, once it is ready, in `.ready_line`."""
    command = [
        *(sys.executable, "-m", "shoal_worker", "--model", model, "--redis", redis_url),
        *("--metrics-port", "0", "--threads", "1", "--lanes", LANES, "--no-warm-up", *options),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            if wait:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.startswith("ready"), process.communicate()[1]
                process.ready_line = line  # type: ignore[attr-defined]
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


@pytest.fixture(scope="module")
def served(module_redis_url: str) -> Iterator[tuple[Client, str]]:
    """A client of one worker that most tests share, and the worker's first line."""
    served = serving(module_redis_url, "--dtype", "float32")
    with served as process, Client(module_redis_url) as client:
        yield client, process.ready_line  # type: ignore[attr-defined]


def reference_tokens(folder: Path, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Each prompt alone through transformers' own greedy `generate`, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    completions = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)
        completions.append(output[0, tokens["input_ids"].shape[1] :].tolist())
    return completions


def test_greedy_completions_through_the_queue_equal_transformers_generate(
    served: tuple[Client, str],
) -> None:
    client, _ = served
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:40]

    results = list(client.map(prompts, max_tokens=12, temperature=0.0, timeout=120))

    assert len({len(prompt.split()) for prompt in prompts}) > 5, "the lengths are mixed"
    ours = [result.completions[0].token_ids for result in results]
    assert ours == reference_tokens(DEMO, prompts, 12)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_model_families_equal_transformers_generate(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model_folder(tmp_path / kind, kind=kind)  # type: ignore[arg-type]
    prompts = ["the cat", "a dog sat on the mat and", "it", "one two three four five six"]

    results = Generator(str(folder), dtype="float32", lanes="bulk=2x64", threads=1).generate(
        prompts, max_tokens=10, temperature=0.0
    )

    ours = [result.completions[0].token_ids for result in results]
    assert ours == reference_tokens(folder, prompts, 10)


def test_a_request_gets_the_same_tokens_in_company_and_alone() -> None:
    generator = Generator("demo", lanes="bulk=8x512", threads=1, warm_up=False)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:24]

    together = generator.generate(prompts, max_tokens=8, top_k=20, seed=3)
    alone = [generator.generate([p], max_tokens=8, top_k=20, seed=3)[0] for p in prompts]

    assert [r.completions for r in together] == [r.completions for r in alone]


def test_every_row_of_a_killed_worker_arrives_from_another(redis_url: str) -> None:
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:64]
    with Client(redis_url) as client:
        jobs = client.submit_many(prompts, requests_per_job=8)
        with serving(redis_url, "--lease", "1") as first:
            wait_until(lambda: any(job.done() for job in jobs), "a first result", timeout_s=60)
            first.kill()
        assert not all(job.done() for job in jobs), "it was killed in mid-run"
        with serving(redis_url, "--lease", "1"):
            results = [job.result(timeout=120) for job in jobs]

    assert [result.prompt for result in results] == prompts
    assert all(result.usage.completion_tokens > 0 for result in results)


def test_the_engine_process_ends_with_its_killed_worker(redis_url: str) -> None:
    with serving(redis_url) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        [engine] = children.read_text().split()
        process.kill()
        wait_until(lambda: not _runs(int(engine)), "the engine is gone")


def test_a_killed_engine_is_replaced_and_its_request_answered(redis_url: str) -> None:
    with serving(redis_url) as process, Client(redis_url) as client:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        [engine] = children.read_text().split()
        os.kill(int(engine), signal.SIGKILL)
        job = client.submit("This function", max_tokens=4)
        assert job.result(timeout=60).usage.completion_tokens > 0


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_endpoints_tell_of_health_readiness_and_what_was_done(served: tuple[Client, str]) -> None:
    client, ready_line = served
    client.submit("This function returns", max_tokens=5).result(timeout=60)
    found = re.search(r"http://\S+(?=/metrics)", ready_line)
    assert found is not None

    def page(name: str) -> str:
        return str(urllib.request.urlopen(f"{found[0]}/{name}").read().decode())

    def has_counted(sample: str) -> bool:
        return any(
            re.match(sample, line) and float(line.split()[-1]) >= 1
            for line in page("metrics").splitlines()
        )

    assert (page("healthz"), page("readyz")) == ("ok\n", "ok\n")
    for sample in (
        r'shoal_jobs_committed_total{.*outcome="finished",queue="shoal-default"',
        r'shoal_generation_tokens_total{lane="interactive',
    ):
        wait_until(lambda sample=sample: has_counted(sample), f"{sample} has counted")


def test_requests_that_cannot_run_fail_alone_and_say_why(served: tuple[Client, str]) -> None:
    client, _ = served
    fine = client.submit("This function", max_tokens=3)
    long = client.submit("word " * 600, max_tokens=3)
    other = client.submit("This function", max_tokens=3, model="gpt2")
    unknown = client.submit([999_999], max_tokens=3)

    assert fine.result(timeout=60).completions
    with pytest.raises(PromptTooLong, match="this worker takes 512"):
        long.result(timeout=60)
    with pytest.raises(ModelMismatch, match="serves 'demo'"):
        other.result(timeout=60)
    with pytest.raises(InvalidRequest, match="999999"):
        unknown.result(timeout=60)


def test_one_request_of_a_job_is_cancelled_and_its_neighbours_finish(
    served: tuple[Client, str],
) -> None:
    client, _ = served
    prompts = [f"This function number {i}" for i in range(12)]
    jobs = client.submit_many(prompts, requests_per_job=12)
    jobs[11].cancel()

    outcomes = []
    for job in jobs:
        try:
            outcomes.append(len(job.result(timeout=60).completions))
        except Cancelled:
            outcomes.append(0)

    assert outcomes[:11] == [1] * 11
    assert outcomes[11] in (0, 1), "the mark may come after the request's end"


def test_a_stream_s_pieces_make_the_text(served: tuple[Client, str]) -> None:
    client, _ = served
    options = {"max_tokens": 24, "seed": 5, "ignore_eos": True}

    pieces = list(client.stream("This function returns", timeout=60, **options))  # type: ignore[arg-type]
    whole = client.submit("This function returns", **options).result(timeout=60)  # type: ignore[arg-type]

    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--model", "demo", "--lanes", "bulk=8x9999"], 1, "2 to 512 positions"),
        (["--model", "demo", "--dtype", "float8"], 2, "float8"),
        (["--model", "demo", "--lease", "0"], 2, "--lease"),
        (["--model", "demo", "--queues", "a,a"], 2, "a twice"),
        (["--model", "demo", "--redis", "redis://127.0.0.1:1/0"], 1, "127.0.0.1:1"),
        ([], 2, "--model demo"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    redis_url: str, arguments: list[str], code: int, text: str
) -> None:
    redis = [] if "--redis" in arguments else ["--redis", redis_url]
    done = subprocess.run(
        [sys.executable, "-m", "shoal_worker", *arguments, *redis, "--metrics-port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named_with_what_to_do(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "shoal_worker", "--model", "demo", "--redis", redis_url]
        done = subprocess.run(
            [*command, "--metrics-port", port], capture_output=True, text=True, check=False
        )

    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--metrics-port" in done.stderr
