"""Loading a model: from what a user names to weights on a device that run with our attention.

Owns where models come from and every complaint about one. Knows no lanes and no sampling. Weights
are read from safetensors only, and no code comes with a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from shoal.errors import ModelError
from shoal_worker.engine import attention
from shoal_worker.engine.fingerprint import digest_of_files, environment, fingerprint_of
from shoal_worker.engine.probe import probe
from shoal_worker.engine.reproducible import pin_arithmetic
from shoal_worker.engine.source import located
from shoal_worker.engine.support import one_line, supported_config

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Missing or broken files, tensors of another size, too little memory, a package that is not there.
_LOADING_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError)
_DECIDING_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what the worker needs to know of it.

    Attributes:
        name: what it is served as: "demo", a folder's own name, or its id on the hub.
        max_positions: prompt and completion together.
        vocab_size: logits of a position.
        eos_token_ids: tokens that end a completion.
        fingerprint: names weights, tokenizer, hardware, versions and settings.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    device: torch.device
    dtype: torch.dtype
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str


def load_model(model: str, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a model for serving.

    Args:
        model: "demo", a local folder, or an id on the Hugging Face hub.
        device: auto (CUDA where there is any), cpu, cuda or cuda:N.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on CUDA and on a CPU with AMX or
            AVX512-BF16, else float32.

    Raises:
        ModelError: it cannot be found, read or run; the message says what to do.
    """
    pin_arithmetic()
    place = device_of(device)
    numbers = dtype_on(place, dtype)
    name, folder = located(model)
    config = supported_config(folder, name)
    tokenizer = _tokenizer(folder, name)
    network = _network(folder, name, config, numbers)
    nn.Module.to(network, place)
    probe(network)
    text_config = config.get_text_config(decoder=True)
    settings = environment(place, numbers)
    settings["files"] = digest_of_files(_deciding_files(folder))
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        name=name,
        device=network.device,
        dtype=numbers,
        max_positions=_max_positions(text_config, name),
        vocab_size=text_config.vocab_size,
        eos_token_ids=_eos_token_ids(network, tokenizer),
        fingerprint=fingerprint_of(settings),
    )


def device_of(device: str) -> torch.device:
    """The device of a setting: auto, cpu, cuda or cuda:N.

    Raises:
        ModelError: it is none of them, or not there.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise ModelError(f"device {device!r} is not one of auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not available:
        raise ModelError(f"device {device!r} is not available: torch finds no CUDA here; use cpu")
    if number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ModelError(f"device {device!r} does not exist: there are {count}, counted from 0")
    return torch.device(device)


def dtype_on(device: torch.device, dtype: str) -> torch.dtype:
    """The number format of a setting on a device.

    Raises:
        ModelError: there is none of this name.
    """
    if dtype == "auto":
        return (
            torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32
        )
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without them float32 is faster."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False  # torch 2.11 does not say.
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    problem = "there is no tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # What a missing or broken tokenizer raises depends on its class; `tokenizers` has no class.
    except Exception as error:  # noqa: BLE001
        tokenizer, problem = None, one_line(error)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"model {name!r} has no fast tokenizer: {problem}; "
            "add the tokenizer.json that save_pretrained of its tokenizer writes"
        )
    # It would take spaces away that the model wrote.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _network(
    folder: Path, name: str, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    attention.register()
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.ATTENTION_NAME,
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise ModelError(f"model {name!r} could not be loaded: {one_line(error)}") from None
    network, loading = loaded
    assert isinstance(network, PreTrainedModel)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "its files do not belong to its config.json"
        )
    # transformers would look for padding in every input, and wait for the device to do so.
    network.config.pad_token_id = None
    network.requires_grad_(requires_grad=False)
    return network


def _max_positions(config: PreTrainedConfig, name: str) -> int:
    for limit in _POSITION_LIMITS:
        value = getattr(config, limit, None)
        if isinstance(value, int) and value > 1:
            return value
    limits = ", ".join(_POSITION_LIMITS)
    raise ModelError(
        f"model {name!r} does not say how many positions it takes: set one of {limits}"
    )


def _eos_token_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    generation: GenerationConfig | None = network.generation_config
    candidates = (generation, network.config, tokenizer)
    for source in candidates:
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def _deciding_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer: what decides a token in a model's folder."""
    return [file for pattern in _DECIDING_FILES for file in folder.glob(pattern) if file.is_file()]
