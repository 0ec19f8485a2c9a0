"""Writes the tables of metrics in ops/README.md from the code that exports them.

`--check` only compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ops.every_metric import exporter_families, worker_families
from ops.vllm_names import OPENTELEMETRY, VLLM
from prometheus_client.core import Metric

README = Path(__file__).resolve().parent / "README.md"
HEADER = (
    "| metric | type | labels | meaning | vLLM | OpenTelemetry GenAI |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def table(families: Iterable[Metric]) -> str:
    """Families as a Markdown table, by name."""
    lines = [_line(family) for family in sorted(families, key=lambda one: one.name)]
    return "\n".join([HEADER, *lines])


def with_tables(text: str) -> str:
    """The runbook's text with both tables as they should be."""
    for name, families in (("worker", worker_families()), ("exporter", exporter_families())):
        pattern = rf"(<!-- {name}-metrics:[^>]*-->\n).*?(<!-- /{name}-metrics -->)"
        replacement = r"\g<1>" + table(families).replace("\\", r"\\") + r"\n\g<2>"
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"ops/README.md has {count} places for the {name}'s metrics, not 1")
    return text


def _line(family: Metric) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
    theirs = VLLM[name][0] if name in VLLM else None
    open_telemetry = OPENTELEMETRY.get(name)
    cells = (
        f"`{name}`",
        family.type,
        ", ".join(f"`{label}`" for label in sorted(labels, key=_place)) or "–",
        family.documentation,
        f"`{theirs}`" if theirs else "–",
        open_telemetry or "–",
    )
    return f"| {' | '.join(cells)} |"


def _place(label: str) -> tuple[bool, str]:
    return label != "model_name", label


def main() -> None:
    """Write the tables, or with `--check` fail if they are not current."""
    text = README.read_text(encoding="utf-8")
    current = with_tables(text)
    if "--check" in sys.argv and current != text:
        raise SystemExit("ops/README.md's tables are not current; run `make readme`")
    README.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
