"""Writes the dashboards as Grafana loads them; `--check` only compares.

`python -m ops.grafana.generate` from the repository's root.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from ops.grafana.bulk_run import bulk_run
from ops.grafana.overview import overview
from ops.grafana.worker import worker

FOLDER = Path(__file__).resolve().parent / "dashboards"
DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "shoal-overview": overview,
    "shoal-bulk-run": bulk_run,
    "shoal-worker": worker,
}


def text_of(build: Callable[[], Dashboard]) -> str:
    """A dashboard as JSON."""
    return json.dumps(build().build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all, or with `--check` fail if a file is not current."""
    FOLDER.mkdir(exist_ok=True)
    for name, build in DASHBOARDS.items():
        path, text = FOLDER / f"{name}.json", text_of(build)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} is not current; run `make dashboards`")


if __name__ == "__main__":
    main()
