"""What a user leaves open follows from the device; what cannot be done there is not done."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import ModelError
from shoal_worker.engine import native
from shoal_worker.engine.options import Choices, EngineOptions

CPU = torch.device("cpu")


def test_a_cpu_makes_one_step_at_a_time_and_reads_it_at_once() -> None:
    choices = EngineOptions().on(CPU)

    assert choices == Choices(
        cuda_graphs=False,
        compile=False,
        kernels=True,
        decode_steps=1,
        run_ahead=False,
        native=native.library_path().stem,
    )


def test_what_only_a_gpu_can_do_is_not_done_on_a_cpu() -> None:
    asked = EngineOptions(cuda_graphs=True, run_ahead=True)

    assert asked.on(CPU) == EngineOptions().on(CPU)


def test_without_a_compiler_a_cpu_runs_without_kernels_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> None:
        raise native.NativeUnavailable("there is no C++ compiler")

    monkeypatch.setattr(native, "library", unavailable)

    assert not EngineOptions().on(CPU).kernels
    assert "running without native code, which is slower: there is no C++ compiler" in caplog.text


def test_the_number_of_steps_is_the_user_s() -> None:
    assert EngineOptions(decode_steps=3).on(CPU).decode_steps == 3


def test_only_what_changes_bits_is_named_for_the_fingerprint() -> None:
    plain = EngineOptions().on(CPU).deciding()

    assert EngineOptions(decode_steps=7).on(CPU).deciding() == plain
    for changed in (EngineOptions(compile=True), EngineOptions(kv_dtype="int8")):
        assert changed.on(CPU).deciding() != plain
    assert EngineOptions(kernels=False).on(CPU).deciding() != plain


def test_int8_keys_and_values_are_refused_on_a_gpu() -> None:
    with pytest.raises(ModelError, match="--kv-dtype int8 runs on a CPU alone"):
        EngineOptions(kv_dtype="int8").on(torch.device("cuda"))
