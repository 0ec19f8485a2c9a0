"""Memory is counted as the tightest of what the machine and the container leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.serving import TABLE, loaded_model, mixed_sequences, serve

from shoal_worker.engine import Engine, memory, slots
from shoal_worker.engine.options import EngineOptions

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


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("options", [{}, {"kernels": False}], ids=["native", "torch alone"])
@pytest.mark.parametrize(("where", "at"), [("forward", 3), ("draw", 4)])
def test_a_step_that_runs_out_of_memory_once_is_made_again_with_the_same_tokens(
    error: BaseException,
    options: dict[str, Any],
    where: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = loaded_model()
    undisturbed, disturbed = mixed_sequences(), mixed_sequences()
    serve(Engine(loaded, TABLE, EngineOptions(**options)), undisturbed)
    engine = Engine(loaded, TABLE, EngineOptions(**options))
    failing, owner = (
        (loaded.model, "forward") if where == "forward" else (slots, "log_probabilities")
    )
    calls: list[None] = []
    function = getattr(failing, owner)

    def fails_once(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == at + 1:
            raise error
        return function(*arguments, **keywords)

    monkeypatch.setattr(failing, owner, fails_once)
    serve(engine, disturbed)

    assert len(calls) > at + 1
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


def test_memory_that_does_not_suffice_twice_and_other_errors_end_the_step() -> None:
    calls: list[int] = []

    def fails(error: Exception) -> None:
        calls.append(len(calls))
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        memory.with_room(lambda: fails(torch.OutOfMemoryError("full")))
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="shape"):
        memory.with_room(lambda: fails(RuntimeError("shape mismatch")))
    assert len(calls) == 3


def test_sizes_are_written_in_the_unit_that_suits_them() -> None:
    assert memory.readable(3 * GIB // 2) == "1.5 GiB"
    assert memory.readable(2**20) == "1.0 MiB"
