"""Tiny random models of several kinds, in memory or as folders, for tests that need a real one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Kind = Literal["gpt2", "llama", "qwen2", "qwen3", "opt", "gpt_neox", "mistral"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "qwen2", "qwen3", "opt", "gpt_neox", "mistral")

VOCAB_SIZE = 320
MAX_POSITIONS = 128
EOS_TOKEN = "<|endoftext|>"

_SENTENCES = (
    "A shoal of fish turns at once, and no fish leads it.",
    "The queue holds the prompts; the worker reads them in their order.",
    "Grüße aus Köln, 你好, καλημέρα: text is more than ASCII.",
    "One lane, eight slots, a thousand positions.",
)
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    # Larger than usual, so that logits differ enough for greedy tokens to vary.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GATED: dict[str, Any] = {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2}


def tiny_config(kind: Kind, **changes: Any) -> PreTrainedConfig:
    """A new configuration of this kind; `changes` override its fields."""
    if kind == "gpt2":
        return GPT2Config(**{**_SMALL, **changes})
    if kind == "opt":
        opt = {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2}
        return OPTConfig(**{**_SMALL, **opt, **changes})
    if kind == "gpt_neox":
        return GPTNeoXConfig(**{**_SMALL, "intermediate_size": 128, **changes})
    if kind == "mistral":
        return MistralConfig(**{**_GATED, "sliding_window": None, **changes})
    gated: dict[str, type[PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }
    return gated[kind](**{**_GATED, "head_dim": 16, **changes})


def tiny_model(config: PreTrainedConfig, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A model with random weights. Equal seeds give equal weights, whatever the attention."""
    # Models built from one configuration object share its attention setting.
    own = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(own, attn_implementation=attention)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the models' vocabulary, with no unknown text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)


def make_tiny_model_folder(path: Path, kind: Kind = "gpt2", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model with its tokenizer as save_pretrained does; `path` is made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_model(tiny_config(kind, **changes), seed=seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
