"""Writes the README's tables from the settings' own descriptions; `--check` only compares."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from shoal.wire import SamplingParams
from shoal_worker.settings import default_text, settings_table

README = Path(__file__).resolve().parent.parent / "README.md"


def sampling_table() -> str:
    """All sampling parameters as a Markdown table: name, default, meaning."""
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, info in SamplingParams.model_fields.items():
        lines.append(f"| `{name}` | {default_text(info)} | {info.description} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README's text with both tables as they should be."""
    for name, table in (("settings", settings_table()), ("sampling", sampling_table())):
        pattern = rf"(<!-- {name}:[^>]*-->\n).*?(<!-- /{name} -->)"
        replacement = r"\g<1>" + table.replace("\\", r"\\") + r"\n\g<2>"
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table of {name}, not 1")
    return text


def main() -> None:
    """Write the tables, or with `--check` fail if they are not current."""
    text = README.read_text(encoding="utf-8")
    current = with_tables(text)
    if "--check" in sys.argv and current != text:
        raise SystemExit("README.md's tables are not current; run `make readme`")
    README.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
