"""Log lines as JSON: every line of every command is an object, whoever wrote it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shoal.cli.group import shoal as command_line
from shoal.logs import JsonFormatter, json_line

COMMAND = [sys.executable, "-c", "from shoal.cli import main; main()"]


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for one in found:
        assert set(one) - {"error"} == {"time", "level", "logger", "process", "message"}
    return found


def test_a_record_is_one_line_with_its_traceback() -> None:
    try:
        int("two\nlines")
    except ValueError:
        record = logging.LogRecord(
            "shoal.x", logging.ERROR, "", 0, "job %s: ü", ("a",), sys.exc_info()
        )
    line = JsonFormatter().format(record)

    [found] = objects(line)
    assert (found["level"], found["logger"], found["message"]) == ("error", "shoal.x", "job a: ü")
    assert found["error"].startswith("Traceback")
    assert found["time"].endswith("+00:00")
    assert objects(json_line("info", "x"))[0]["logger"] == "shoal.cli"


def test_what_a_process_says_without_a_logger_is_json_too() -> None:
    program = (
        "import warnings; from shoal.logs import configure; configure('info', 'json');"
        "warnings.warn('old'); raise ValueError('bad')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    old, bad = objects(ended.stderr)
    assert "old" in old["message"]
    assert (bad["level"], bad["logger"]) == ("critical", "shoal")
    assert bad["error"].rstrip().endswith("ValueError: bad")
    assert ended.returncode == 1


@pytest.mark.parametrize("by_variable", [True, False])
def test_notes_and_errors_of_commands(tmp_path: Path, by_variable: bool) -> None:
    (tmp_path / "in.txt").touch()
    arguments = ["bulk", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.jsonl")]
    option = [] if by_variable else ["--log-format", "json"]
    environ = {"SHOAL_LOG_FORMAT": "json"} if by_variable else {}
    runner = CliRunner()

    empty = runner.invoke(command_line, [*arguments, *option], env=environ)
    failed = runner.invoke(
        command_line, ["status", "--redis", "unix:///none", *option], env=environ
    )

    assert "is empty" in objects(empty.stderr)[0]["message"]
    [error] = objects(failed.stderr)
    assert (error["level"], error["logger"]) == ("error", "shoal.cli")
    assert "there is no such socket file" in error["message"]
    assert failed.exit_code == 1


def test_an_unknown_format_is_refused() -> None:
    outcome = CliRunner().invoke(command_line, ["status"], env={"SHOAL_LOG_FORMAT": "xml"})

    assert outcome.exit_code == 2
    assert "'xml' is not one of 'text', 'json'" in outcome.stderr


def test_the_exporter_and_its_ready_line(redis_url: str) -> None:
    arguments = ["exporter", "--redis", redis_url, "--metrics-port", "0", "--log-format", "json"]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        [ready] = objects(process.stdout.readline())
        process.terminate()
        _out, err = process.communicate(timeout=20)

    assert ready["message"].startswith("ready: queues at unix://")
    assert objects(err) == []


def test_a_worker_and_its_engine() -> None:
    arguments = ["worker", "--model", "demo", "--burst", "--lanes", "bulk=2x32,interactive=2x32"]
    ended = subprocess.run(
        [*COMMAND, *arguments, "--metrics-port", "0", "--log-format", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert objects(ended.stdout)[0]["message"].startswith("ready: demo on cpu")
    assert "embedded Redis" in objects(ended.stderr)[0]["message"]


def test_text_stays_text() -> None:
    outcome = CliRunner().invoke(command_line, ["status", "--redis", "unix:///none"])

    assert outcome.stderr.startswith("shoal: no Redis answers at unix:///none")
