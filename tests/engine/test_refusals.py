"""What cannot be loaded or run is refused in one plain line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tests.tiny_models import (
    VOCAB_SIZE,
    tiny_config,
    tiny_tokenizer,
)
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    Gemma2Config,
    GPTJConfig,
    GPTNeoConfig,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
)

from shoal.errors import ModelError
from shoal_worker.engine import load_model, source
from shoal_worker.engine.model import _max_positions


def refusal(model: Path | str, **options: str) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith(f"model '{tmp_path}/nowhere' does not exist")
    assert "does not exist" in refusal("./nowhere")
    assert "no model is named" in refusal("")


def test_a_file_is_no_model_folder(tiny_folder: Path) -> None:
    assert "is a file; name the folder" in refusal(tiny_folder / "config.json")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "gpt2", "n_embd": "wide"}'])
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)

    assert "config.json" in refusal(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    assert "only pickled weights" in refusal(folder)
    assert "save_pretrained" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    assert "no *.safetensors" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    assert "could not be loaded" in refusal(folder)


def test_weights_that_lack_a_tensor_are_refused_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, path, {"format": "pt"})

    assert "lacks 1 of its weights, such as transformer.h.1.mlp.c_fc.weight" in refusal(folder)


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    assert "could not be loaded" in refusal(with_config(folder, vocab_size=VOCAB_SIZE + 1))


def test_a_model_without_a_fast_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()

    assert "has no fast tokenizer" in refusal(folder)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    message = refusal("shoal-tests/no-such-model")

    assert message.startswith("model 'shoal-tests/no-such-model' is no folder here")
    assert "local folder or check the network" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RepositoryNotFoundError, "neither a folder here nor a public model on the hub"),
        (GatedRepoError, "is gated: accept its terms"),
        (HfHubHTTPError.__bases__[0], "could not be fetched from the hub"),
    ],
)
def test_each_answer_of_the_hub_says_what_to_do(
    error: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str, **__: object) -> str:
        # Made without their constructors, which want a response of the HTTP library in use.
        raise error.__new__(error)

    monkeypatch.setattr(source, "snapshot_download", fail)

    assert advice in refusal("somebody/private")


def test_a_name_that_no_hub_takes_is_refused() -> None:
    assert "is no folder here" in refusal("not a name")


def test_the_bundled_model_is_missed_when_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shoal_worker.engine.source._BUNDLED", tmp_path)

    assert "bundled model 'demo' is missing" in refusal("demo")


UNSUPPORTED: list[tuple[PreTrainedConfig, str]] = [
    (T5Config(), "encoder-decoder"),
    (BartConfig(), "encoder-decoder"),
    (MambaConfig(), "recurrent state"),
    (GPTNeoConfig(), "GPTNeoForCausalLM takes no attention function"),
    (GPTJConfig(), "GPTJForCausalLM takes no attention function"),
    (BloomConfig(), "BloomForCausalLM takes no attention function"),
    (tiny_config("mistral", sliding_window=32), "sliding-window attention .32 tokens."),
    (
        tiny_config("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1),
        "sliding_attention",
    ),
    (Gemma2Config(), "sliding_attention"),
    (
        tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rotary positions .dynamic. depend on the longest row",
    ),
]


@pytest.mark.parametrize(
    ("config", "reason"), UNSUPPORTED, ids=[config.model_type for config, _ in UNSUPPORTED]
)
def test_a_kind_that_cannot_run_on_slots_is_refused_before_its_weights_are_read(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=f"is not supported: .*{reason}.*name a decoder-only"):
        load_model(str(tmp_path))


def test_an_encoder_is_refused_by_what_its_attention_says(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    assert "is not supported: its attention" in refusal(tmp_path)


def test_a_model_that_does_not_say_how_long_it_may_be_is_refused() -> None:
    with pytest.raises(ModelError, match="how many positions it takes"):
        _max_positions(PreTrainedConfig(), "endless")


def test_a_model_that_brings_its_own_code_is_refused(folder: Path) -> None:
    with_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})

    assert "brings its own Python code, and Shoal runs none" in refusal(folder)


def test_a_type_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    assert "does not know this type" in refusal(with_config(folder, model_type="gpt-unheard-of"))


def test_quantized_weights_are_refused(folder: Path) -> None:
    with_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})

    assert "quantized" in refusal(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "mps", ""])
def test_a_device_of_another_spelling_is_refused(tiny_folder: Path, device: str) -> None:
    assert "is not one of auto, cpu, cuda or cuda:N" in refusal(tiny_folder, device=device)


def test_cuda_that_is_not_there_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert "torch finds no CUDA here; use cpu" in refusal(tiny_folder, device="cuda:0")


def test_a_gpu_past_the_last_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert "'cuda:2' does not exist: there are 2" in refusal(tiny_folder, device="cuda:2")


def test_a_dtype_of_another_spelling_is_refused(tiny_folder: Path) -> None:
    assert "'int8' is not one of auto, float32, bfloat16, float16" in refusal(
        tiny_folder, dtype="int8"
    )
