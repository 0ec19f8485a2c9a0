"""Sizes are those of the model, and a device reaches something."""

from __future__ import annotations

import pytest
import torch
from tests.engine.serving import loaded_model
from tests.tiny_models import VOCAB_SIZE, Kind

from shoal_worker.bench import ceilings
from shoal_worker.bench.ceilings import measured_ceilings, size_of
from shoal_worker.engine import Engine
from shoal_worker.lanes import LaneSpec, LaneTable

HIDDEN, LAYERS = 64, 2


def test_gpt2_s_weights_are_its_products_and_its_tied_output_layer() -> None:
    size = size_of(loaded_model())

    assert size.block_weights == LAYERS * 12 * HIDDEN**2
    assert size.output_weights == VOCAB_SIZE * HIDDEN
    assert (size.layers, size.attention_width) == (LAYERS, HIDDEN)
    assert size.kv_bytes_per_token == LAYERS * 2 * HIDDEN * 4


def test_grouped_queries_keep_fewer_keys_than_they_attend_with() -> None:
    size = size_of(loaded_model("llama"))

    assert size.attention_width == 4 * 16
    assert size.kv_bytes_per_token == LAYERS * 2 * 2 * 16 * 4
    assert size.output_weights == VOCAB_SIZE * HIDDEN


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_the_engine_makes_of_a_model_changes_no_size(kind: Kind) -> None:
    loaded = loaded_model(kind)
    before = size_of(loaded)

    Engine(loaded, LaneTable([LaneSpec("bulk", 2, 64)]))

    assert size_of(loaded) == before


def test_a_device_reaches_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(ceilings, "_WIDTH", {"cpu": 64})

    reached = measured_ceilings(torch.device("cpu"), torch.float32)

    assert reached.bytes_per_s > 0
    assert reached.operations_per_s > 0
