"""One thread, and one model folder for all tests that read one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny_models import make_tiny_model_folder

from shoal_worker.engine.reproducible import pin_arithmetic

# Before the process's first matrix product, as a worker does it.
pin_arithmetic()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    # Tiny products gain nothing from threads and lose much where other processes use the cores.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer; not to be changed."""
    return make_tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")
