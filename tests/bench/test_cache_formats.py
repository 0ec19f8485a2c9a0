"""Both caches are measured on the same texts, and a tiny model's losses are close."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.tiny_models import make_tiny_model_folder

from shoal_worker.bench.cache_formats import main


def test_losses_and_agreement_of_both_caches_are_printed(tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / "tiny")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("once upon a time\n\nthe sea\n")

    arguments = ["--model", str(folder), "--prompts", str(prompts), "--max-tokens", "12"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert "of 2 texts" in result.output
    losses = [float(loss) for loss in re.findall(r"loss with \w+: ([\d.]+)", result.output)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0] != losses[1]
