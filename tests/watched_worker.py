"""`shoal worker` as it is, but for its engine, which is `tests.watched_engine`."""

from __future__ import annotations

import sys
from functools import partialmethod

from shoal.cli import main
from shoal_worker.engine_process import EngineProcess

if __name__ == "__main__":
    EngineProcess.__init__ = partialmethod(EngineProcess.__init__, module="tests.watched_engine")  # type: ignore[method-assign,assignment]
    sys.argv[1:1] = ["worker", "--model", "scripted"]
    main()
