"""How a command ends: its exit code, the one line that says why, and signals as exceptions."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import click

from shoal.bulk.folder import OutputLocked
from shoal.cli.invocation import Invocation, current_invocation
from shoal.errors import Cancelled, Expired, GenerationFailed, InvalidRequest, ResultTimeout
from shoal.logs import json_line

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_LOCKED = 4
EXIT_TIMEOUT = 124
EXIT_SIGNAL_BASE = 128

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# First match wins.
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (OutputLocked, EXIT_LOCKED),
    (ResultTimeout, EXIT_TIMEOUT),
    (InvalidRequest, EXIT_USAGE),
    (GenerationFailed, EXIT_SOME_FAILED),
    (Cancelled, EXIT_SOME_FAILED),
    (Expired, EXIT_SOME_FAILED),
)


class Interrupted(BaseException):
    """A signal asked the command to stop. As KeyboardInterrupt, past every `except Exception`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return EXIT_SIGNAL_BASE + self.signum


class StopRequest:
    """Whether a signal came. The first is kept for a loop to see; a second interrupts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def receive(self, signum: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signum is not None


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise `Interrupted`."""

    def receive(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled(receive):
        yield


@contextlib.contextmanager
def signals_kept() -> Iterator[StopRequest]:
    """Within, the first of these signals only sets the flag that this yields."""
    stop = StopRequest()
    with _handled(stop.receive):
        yield stop


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    if isinstance(error, (Interrupted, click.ClickException)):
        return error.exit_code
    if isinstance(error, click.Abort):
        return EXIT_SIGNAL_BASE + signal.SIGINT
    return next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_ERROR)


def complain(error: BaseException, invocation: Invocation) -> None:
    """Say in one line on stderr what went wrong."""
    _say("error", in_words(error), invocation)


def note(text: str) -> None:
    """One line for the person at the terminal, or for the log, beside the command's output."""
    _say("info", text, current_invocation())


def _say(level: str, text: str, invocation: Invocation) -> None:
    line = " ".join(text.split())
    as_json = invocation.log_format == "json"
    click.echo(json_line(level, line) if as_json else f"shoal: {line}", err=True)


def in_words(error: BaseException) -> str:
    """An error in plain words, without the type's name where the message says enough."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} (see `{error.ctx.command_path} --help`)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, (Interrupted, click.Abort)):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        return f"{where}{error.strerror}"
    text = str(error) or type(error).__name__
    if exit_code(error) == EXIT_ERROR and not type(error).__module__.startswith("shoal"):
        return f"{type(error).__name__}: {text} (--debug shows where)"
    return text


@contextlib.contextmanager
def _handled(receive: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals belong to the main thread, and so does their handling.
        return
    before = {signum: signal.signal(signum, receive) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
