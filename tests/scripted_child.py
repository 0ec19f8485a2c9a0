"""The scripted engine in a process of its own, as `shoal_worker.engine_process` runs the real one.

`python -m tests.scripted_child PIPE LOG_LEVEL`. A prompt `crash` kills it when it is answered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from tests.scripted_engine import DELAY_VARIABLE, ScriptedEngine

from shoal_worker.messages import Shutdown

POLL_S = 0.002


def main() -> None:
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    connection.recv()
    engine = ScriptedEngine(float(os.environ.get(DELAY_VARIABLE, "0")))
    with contextlib.suppress(EOFError, OSError):
        while True:
            while connection.poll(POLL_S):
                message = connection.recv()
                if isinstance(message, Shutdown):
                    return
                engine.send(message)
            try:
                outgoing = engine.receive(0)
            except EOFError:
                os.kill(os.getpid(), signal.SIGKILL)
            for one in outgoing:
                connection.send(one)


if __name__ == "__main__":
    main()
