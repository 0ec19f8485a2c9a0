"""Writes the parts of ops/requirements.lock that an image installs: only what its extras need.

`python ops/docker/locks.py` after `make lock`, in the environment that `make` sets up: which
package needs which is read from what is installed there, versions and digests from the lock.
`--check` only compares. What comes with the chosen build of torch is in no lock (see the Makefile).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = Path(__file__).resolve().parent
LOCK = DOCKER.parent / "requirements.lock"
IMAGE = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
ROOTS = {"build": "hatchling", "producer": "shoal[exporter]", "worker": "shoal[exporter,worker]"}


def needed(requirement: Requirement, seen: set[tuple[str, str]] | None = None) -> set[str]:
    """The names of all that a package needs, itself included."""
    seen = set() if seen is None else seen
    names: set[str] = {canonicalize_name(requirement.name)}
    for extra in ("", *sorted(requirement.extras)):
        at = (canonicalize_name(requirement.name), extra)
        if at in seen:
            continue
        seen.add(at)
        for text in _requires(requirement.name):
            other = Requirement(text)
            if other.marker is None or other.marker.evaluate(IMAGE | {"extra": extra}):
                names |= needed(other, seen)
    return names


def part(lock: str, names: set[str]) -> str:
    """The lock's entries of these packages."""
    return "".join(entry for name, entry in _entries(lock) if name in names)


def files() -> dict[Path, str]:
    """Each file and what it should hold."""
    lock = LOCK.read_text(encoding="utf-8")
    head = "# A part of ops/requirements.lock, made by ops/docker/locks.py.\n"
    return {
        DOCKER / f"{image}.lock": head + part(lock, needed(Requirement(root)))
        for image, root in ROOTS.items()
    }


def main() -> None:
    """Write the files, or with `--check` fail if one is not current."""
    for path, text in files().items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is not current; run python ops/docker/locks.py")


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []  # Of another platform, or a part of torch's build.


def _entries(lock: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^([A-Za-z0-9._-]+).*(?:\n    .*)*\n", lock, flags=re.MULTILINE):
        yield canonicalize_name(match[1]), match[0]


if __name__ == "__main__":
    main()
