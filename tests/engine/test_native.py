"""The library is built once, where the user wants it; what goes wrong is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_worker.engine import native
from shoal_worker.engine.native import NativeUnavailable


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """Nothing is remembered from before, nor afterwards."""
    for function in (native.library, native.library_path):
        function.cache_clear()
    yield
    for function in (native.library, native.library_path):
        function.cache_clear()


def a_compiler(folder: Path, script: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_reason_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(NativeUnavailable, match=r"no C.. compiler; install g.. or name one in CXX"):
        native.library()


def test_the_library_is_built_once_and_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv(native.CACHE, str(tmp_path))

    path = native.library_path()
    native.library()
    built = path.stat().st_mtime_ns
    native.library.cache_clear()
    native.library()

    assert path.stat().st_mtime_ns == built
    assert list(tmp_path.iterdir()) == [path]


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "echo 'native.cpp:1: error: no such thing' >&2; exit 1"
    monkeypatch.setenv("CXX", a_compiler(tmp_path, script))
    monkeypatch.setenv(native.CACHE, str(tmp_path / "kernels"))

    with pytest.raises(NativeUnavailable, match=r"cannot build native.cpp: .*error: no such thing"):
        native.library()


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", a_compiler(tmp_path, "exit 0"))
    monkeypatch.setenv(native.CACHE, str(tmp_path / "file" / "kernels"))

    with pytest.raises(NativeUnavailable, match=r"cannot be written .* set SHOAL_KERNEL_CACHE"):
        native.library()
