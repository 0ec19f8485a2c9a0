"""The `shoal` command.

    group.py      finds commands, loads only the one that runs, and is the edge where errors end
    exits.py      exit codes, signals, and errors as one line
    options.py    options that commands share; sampling options made from SamplingParams
    show.py       consoles and how completions are printed
    serving.py    whether a queue has a worker, and starting one where it has none
    submit.py     submit, result, cancel
    status.py     status
    bulk.py       bulk; run_report.py, progress.py and summary.py tell how it goes and went
    verify.py     verify

`worker` and whatever other extras bring come from the entry points `shoal.commands`.
"""

from __future__ import annotations

from typing import NoReturn

from shoal.cli.group import shoal

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    shoal.main(prog_name="shoal")
    raise AssertionError("click leaves the process")
