"""The CPU's native code: built by the C++ compiler that is there, once, and loaded.

Owns where the library lies and when it is built. Knows nothing of what its functions compute; those
are in `cpp/`, and `native_ops` gives them tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch  # Its OpenMP must be the one that the library finds.

from shoal_worker.engine.fingerprint import hardware

SOURCE = Path(__file__).parent / "cpp" / "native.cpp"
CACHE = "SHOAL_KERNEL_CACHE"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")
_BUILD_TIMEOUT_S = 120.0

log = logging.getLogger("shoal.engine")


class NativeUnavailable(Exception):
    """There is no native code here; the text says why and what to do."""


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first that is found."""
    names = (os.environ.get("CXX", ""), *_COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


@lru_cache
def library() -> ctypes.CDLL:
    """The library, built first where this machine has none for this source.

    Raises:
        NativeUnavailable: there is no compiler, or it cannot build it.
    """
    path = library_path()
    if not path.exists():
        _build(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} could not be loaded: {error}") from None


@lru_cache
def library_path() -> Path:
    """Where the library of this source, compiler and processor belongs.

    Raises:
        NativeUnavailable: there is no compiler, or no folder to write to.
    """
    found = compiler()
    if found is None:
        raise NativeUnavailable("there is no C++ compiler; install g++ or name one in CXX")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    sources = [path.read_text() for path in sorted(SOURCE.parent.iterdir())]
    decides = (*sources, version.stdout, " ".join(_FLAGS), hardware(torch.device("cpu")))
    digest = hashlib.sha256("\0".join(decides).encode()).hexdigest()[:16]
    return _folder() / f"shoal-{platform.machine()}-{digest}.so"


def _folder() -> Path:
    if home := os.environ.get(CACHE):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        return Path(cache) / "shoal"
    try:
        return Path.home() / ".cache" / "shoal"
    except RuntimeError:
        raise NativeUnavailable(f"this user has no home folder; set {CACHE}") from None


def _build(path: Path) -> None:
    found = compiler()
    assert found is not None, "the path is known only where there is a compiler"
    log.info("building the CPU's native code with %s: %s", found, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            # Compiled with OpenMP and linked without: torch has loaded its own, and two of them
            # would fight for the processors.
            steps = (
                [found, *_FLAGS, "-c", str(SOURCE), "-o", f"{made}.o"],
                [found, "-shared", f"{made}.o", "-o", str(made)],
            )
            for command in steps:
                _run(command)
            # Another process may build the same file; each replaces it as a whole.
            made.replace(path)
    except OSError as error:
        raise NativeUnavailable(
            f"{path.parent} cannot be written ({error}); set {CACHE} to a folder that can"
        ) from None


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise NativeUnavailable(f"{command[0]} took over {_BUILD_TIMEOUT_S:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise NativeUnavailable(f"{command[0]} cannot build {SOURCE.name}: {lines[0]}")
