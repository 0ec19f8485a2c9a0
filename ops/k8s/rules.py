"""Writes prometheus-rule.yaml: alerts and recording rules as the Prometheus operator takes them.

`python ops/k8s/rules.py` after a change in ops/prometheus; `--check` only compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

K8S = Path(__file__).resolve().parent
PROMETHEUS = K8S.parent / "prometheus"
SOURCES = ("alerts.yml", "recording.yml")
TARGET = K8S / "prometheus-rule.yaml"
HEAD = """\
# ops/prometheus's rules, made by ops/k8s/rules.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: shoal
  labels:
    app.kubernetes.io/part-of: shoal
spec:
  groups:
"""


def manifest() -> str:
    """The resource, with the files' own text and comments."""
    lines: list[str] = []
    for name in SOURCES:
        _, _, groups = (PROMETHEUS / name).read_text(encoding="utf-8").partition("groups:\n")
        lines += [f"  {line}" if line else "" for line in groups.splitlines()]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Write the file, or with `--check` fail if it is not current."""
    if "--check" not in sys.argv:
        TARGET.write_text(manifest(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != manifest():
        sys.exit(f"{TARGET} is not current; run python ops/k8s/rules.py")


if __name__ == "__main__":
    main()
