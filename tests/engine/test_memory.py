"""Memory is counted as the tightest of what the machine and the container leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal_worker.engine import memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the kernel's files, empty at first."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_a_system_that_says_nothing_gives_no_number(system: Path) -> None:
    assert memory.available_bytes(CPU) is None


def test_the_machine_s_available_memory_counts(system: Path) -> None:
    (system / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")

    assert memory.available_bytes(CPU) == 4 * GIB


def test_a_container_s_limit_less_its_use_counts_where_it_is_tighter(system: Path) -> None:
    (system / "meminfo").write_text("MemAvailable: 4194304 kB\n")
    (system / "memory.max").write_text(f"{3 * GIB}\n")
    (system / "memory.current").write_text(f"{2 * GIB}\n")

    assert memory.available_bytes(CPU) == GIB


def test_a_container_without_a_limit_does_not_count(system: Path) -> None:
    (system / "meminfo").write_text("MemAvailable: 1024 kB\n")
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("5\n")

    assert memory.available_bytes(CPU) == 2**20


def test_sizes_are_written_in_the_unit_that_suits_them() -> None:
    assert memory.readable(3 * GIB // 2) == "1.5 GiB"
    assert memory.readable(2**20) == "1.0 MiB"
