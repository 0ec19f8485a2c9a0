"""Models load from a folder, or from the hub, as what they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.engine.serving import TABLE, random_prompt, sequence, serve
from tests.tiny_models import (
    KINDS,
    MAX_POSITIONS,
    VOCAB_SIZE,
    Kind,
    make_tiny_model_folder,
)

from shoal_worker.engine import Engine, LoadedModel, load_model, source
from shoal_worker.engine.fingerprint import fingerprint_of
from shoal_worker.engine.probe import probe


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_with_what_the_worker_needs_to_know(kind: Kind, tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / f"my-{kind}", kind)
    loaded = load_model(str(folder), device="cpu", dtype="float32")

    assert loaded.name == f"my-{kind}"
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert (loaded.max_positions, loaded.vocab_size) == (MAX_POSITIONS, VOCAB_SIZE)
    assert loaded.eos_token_ids == {0}
    assert loaded.tokenizer.decode(loaded.tokenizer("No  space , lost .").input_ids) == (
        "No  space , lost ."
    )
    assert len(loaded.fingerprint) == 24


def test_a_loaded_model_generates(tiny_folder: Path) -> None:
    one = sequence(random_prompt(1, 10), max_tokens=5)

    serve(Engine(load_model(str(tiny_folder)), TABLE), [one])

    assert len(one.output_token_ids) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_and_cache_take_the_dtype_asked_for(tiny_folder: Path, dtype: str) -> None:
    loaded = load_model(str(tiny_folder), dtype=dtype)

    expected = getattr(torch, dtype)
    assert loaded.dtype == expected
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert {shape.dtype for shape in probe(loaded.model)} == {expected}


@pytest.mark.parametrize("eos", [3, [3, 5]])
def test_end_tokens_may_be_one_or_several(folder: Path, eos: int | list[int]) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": eos}))

    assert load_model(str(folder)).eos_token_ids == set([eos] if isinstance(eos, int) else eos)


def fingerprints(*models: LoadedModel) -> int:
    return len({model.fingerprint for model in models})


def test_the_fingerprint_follows_contents_and_settings_but_not_the_path(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_on_cpu = partial(load_model, device="cpu", dtype="float32")
    first = loaded_on_cpu(str(tiny_folder))
    (folder / "README.json").write_text("{}")
    assert fingerprints(first, loaded_on_cpu(str(folder))) == 1

    other_dtype = loaded_on_cpu(str(tiny_folder), dtype="bfloat16")
    torch.set_float32_matmul_precision("high")
    other_precision = loaded_on_cpu(str(tiny_folder))
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    other_threads = loaded_on_cpu(str(tiny_folder))
    monkeypatch.undo()
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_norm_epsilon": 1e-4}))
    other_config = loaded_on_cpu(str(folder))
    other_weights = loaded_on_cpu(str(make_tiny_model_folder(folder / "other", seed=1)))

    changed = (other_dtype, other_precision, other_threads, other_config, other_weights)
    assert fingerprints(first, *changed) == 6


def test_a_fingerprint_of_settings_ignores_their_order() -> None:
    assert fingerprint_of({"a": "1", "b": "2"}) == fingerprint_of({"b": "2", "a": "1"})
    assert fingerprint_of({"a": "1", "b": "2"}) != fingerprint_of({"a": "12", "b": ""})


def test_a_model_of_the_hub_is_served_by_its_id(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "snapshot_download", lambda model, **_: str(tiny_folder))

    assert load_model("somebody/tiny").name == "somebody/tiny"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_f", torch.float32)],
)
def test_a_cpu_runs_bfloat16_where_it_has_instructions_for_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capability: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})

    assert load_model(str(tiny_folder), device="cpu").dtype == dtype
    assert load_model(str(tiny_folder), device="cpu", dtype="float16").dtype == torch.float16
