"""Stands in for the worker of one GPU: does what the file SCRIPT says for its device.

`python -m tests.scripted_member --device D`. The file maps a device to what each start of it does:
`serve` (until a signal; then exit 0), `give back` (the same, exit 1), or the exit code to end with,
after `ready` if the word is there. Each start is noted, with its variables, in STARTS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def main() -> None:
    device = sys.argv[sys.argv.index("--device") + 1]
    starts = Path(os.environ["STARTS"], device)
    before = starts.read_text().splitlines() if starts.exists() else []
    plans = json.loads(Path(os.environ["SCRIPT"]).read_text())[device]
    plan = plans[min(len(before), len(plans) - 1)]

    def end(signum: int, _frame: FrameType | None) -> None:
        with starts.open("a") as file:
            file.write(f"signal {signum}\n")
        os._exit(0 if plan == "serve" else 1)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)
    mine = {name: value for name, value in os.environ.items() if name.startswith("SHOAL_")}
    with starts.open("a") as file:
        file.write(json.dumps(mine | {"pid": os.getpid()}) + "\n")
    if plan in ("serve", "give back"):
        print(f"ready: scripted on {device}", flush=True)
        signal.pause()
    if "ready" in plan:
        print(f"ready: scripted on {device}", flush=True)
    sys.exit(int(plan.split()[-1]))


if __name__ == "__main__":
    main()
