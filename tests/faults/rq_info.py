"""RQ's own `rq info`, over and over in one process: `python -m tests.faults.rq_info URL`.

Whoever looks also cleans: `rq info` reaps what RQ's registries say is overdue, in its own process
and by its own clock. On SIGTERM the number of looks is printed, and that of looks that failed.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time

from rq.cli.cli import main as rq

LOOK_EVERY_S = 0.1


def main() -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    num_looks = num_failed = 0
    while not stopped:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                rq(["info", "--url", sys.argv[1]], standalone_mode=False)
            num_looks += 1
        except Exception as error:  # noqa: BLE001 - RQ's own defects must not end the looking.
            print(type(error).__name__, error, file=sys.stderr)
            num_failed += 1
        time.sleep(LOOK_EVERY_S)
    print(num_looks, num_failed, flush=True)


if __name__ == "__main__":
    main()
