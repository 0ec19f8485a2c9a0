"""The edge of the command line: which commands there are, and how errors end."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner, Result

from shoal.bulk.folder import OutputLocked
from shoal.cli import group
from shoal.cli.exits import Interrupted, exit_code, in_words
from shoal.errors import (
    Cancelled,
    Expired,
    GenerationFailed,
    InvalidRequest,
    ModelError,
    PromptTooLong,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(group.shoal, arguments)


def entry_point(value: str, name: str = "worker") -> EntryPoint:
    return EntryPoint(name, value, group.ENTRY_POINTS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x"), 2),
        (PromptTooLong("x"), 2),
        (GenerationFailed("x"), 3),
        (Cancelled("x"), 3),
        (Expired("x"), 3),
        (OutputLocked("x"), 4),
        (ResultTimeout("x"), 124),
        (RedisUnavailable("x"), 1),
        (QueueFull("x"), 1),
        (ModelError("x"), 1),
        (ValueError("x"), 1),
        (OSError("x"), 1),
        (Interrupted(2), 130),
        (Interrupted(15), 143),
        (Interrupted(1), 129),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_help_lists_the_commands_of_extras_too() -> None:
    result = invoke("--help")

    assert result.exit_code == 0
    for name in ("submit", "result", "cancel", "status", "bulk", "worker"):
        assert f"  {name} " in result.output


def test_no_command_is_a_call_for_help() -> None:
    result = invoke()

    assert result.exit_code == 0
    assert "Commands:" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "No such command 'nonsense'. (see `shoal --help`)"),
        (("submit",), "Missing argument 'PROMPT...'. (see `shoal submit --help`)"),
        (("submit", "a", "--max-tokens", "x"), "'x' is not a valid integer"),
        (("submit", "a", "--max-tokens", "0", "--redis", "unix:///nowhere"), "max_tokens is 0"),
        (("submit", "a", "--logit-bias", "5"), "write TOKEN=BIAS"),
        (("submit", "a", "b", "--stream"), "--stream is for one prompt; there are 2"),
        (("submit", "a", "--stream", "--json"), "so neither --json"),
        (("result", "no id!"), "'no id!' is no job id"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(group.shoal, arguments, prog_name="shoal")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("shoal: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_redis_is_one_line_and_1() -> None:
    result = invoke("status", "--redis", "unix:///nowhere/redis.sock")

    assert result.exit_code == 1
    assert "no Redis answers at unix:///nowhere/redis.sock" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--debug", "status"), ("status", "--debug")])
def test_debug_shows_the_traceback_too(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments, "--redis", "unix:///nowhere/redis.sock")

    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_defect_is_one_line_that_names_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(group.shoal, "get_command", lambda *_: broken)

    result = invoke("broken")

    assert result.exit_code == 1
    assert result.stderr == "shoal: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_an_operating_system_s_error_names_the_file() -> None:
    assert in_words(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: No such file"


def test_a_command_of_an_extra_that_is_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "_entry_points", lambda: [entry_point("no_such_module:worker")])

    result = invoke("worker", "--model", "demo")
    listing = invoke("--help")

    assert result.exit_code == 1
    assert 'pip install "shoal[worker]"' in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Not installed" in listing.output


def test_a_command_of_an_extra_is_loaded_only_when_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "_entry_points", lambda: [entry_point("no_such_module:worker")])

    assert invoke("status", "--help").exit_code == 0
