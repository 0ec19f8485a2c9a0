"""`python -m shoal_worker` is `shoal worker`, for places where the command is not on PATH."""

import sys

from shoal.cli import main

sys.argv[1:1] = ["worker"]
main()
