"""Which models run on slots, told from a folder's files before any weight is read.

Owns the refusals and their wording. What files cannot tell, `probe` finds out on the model itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from shoal.errors import ModelError

_ADVICE = "name a decoder-only model with plain causal attention, such as GPT-2, Llama or Qwen"
# Their rotary angles follow the longest row of a batch, so a row would depend on its neighbours.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
# What a broken configuration raises depends on its class.
_CONFIG_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    StrictDataclassError,
)
_MAX_ERROR_CHARS = 300


def unsupported(name: str, model_type: str, reason: str) -> ModelError:
    """The error for a model of a kind that we do not run."""
    return ModelError(f"model {name!r} ({model_type}) is not supported: {reason}; {_ADVICE}")


def supported_config(folder: Path, name: str) -> PreTrainedConfig:
    """The configuration of the model in a folder.

    Raises:
        ModelError: it is not a model folder, or one of a kind that we do not run.
    """
    _check_type(_raw_config(folder, name), name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _CONFIG_ERRORS as error:
        raise ModelError(f"model {name!r} has a broken config.json: {one_line(error)}") from None
    _check_config(config, name)
    _check_weights(folder, name)
    return config


def _raw_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model {name!r} is not a model folder: {folder} holds no config.json; "
            "name a folder written by save_pretrained"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"model {name!r} has a broken config.json: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model {name!r} has a config.json without a model_type")
    return config


def _check_type(raw: dict[str, Any], name: str) -> None:
    model_type = str(raw["model_type"])
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" in raw:
        raise unsupported(name, model_type, "it brings its own Python code, and Shoal runs none")
    reason = f"transformers {transformers.__version__} does not know this type"
    raise unsupported(name, model_type, reason)


def _check_config(config: PreTrainedConfig, name: str) -> None:
    reason = _reason_against(config)
    if reason is not None:
        raise unsupported(name, config.model_type, reason)


def _reason_against(config: PreTrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # transformers has no public names for these two.
    if model_class._is_stateful:  # noqa: SLF001
        return f"{model_class.__name__} keeps a recurrent state (a state-space or hybrid model)"
    if not model_class._supports_attention_backend:  # noqa: SLF001
        return f"{model_class.__name__} takes no attention function from outside"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        return f"its layers are of types {', '.join(sorted(layer_types))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"it uses sliding-window attention ({config.sliding_window} tokens)"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in _BATCH_DEPENDENT_ROPE:
        return f"its rotary positions ({rope_type}) depend on the longest row of a batch"
    return None


def _check_weights(folder: Path, name: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"model {name!r} has only pickled weights, which can run code when they are read; "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"model {name!r} has no weights: {folder} holds no *.safetensors file")


def one_line(error: BaseException) -> str:
    """An error of somebody else, as part of one line of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_ERROR_CHARS else f"{text[: _MAX_ERROR_CHARS - 1]}…"
