"""Models of known shapes with random weights: speed depends on shapes, not on what was learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from shoal_worker.bench.shapes import SHAPES
from shoal_worker.engine import LoadedModel, attention
from shoal_worker.engine.reproducible import pin_arithmetic

_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def random_model(shape: str, device: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """A model of one of the `SHAPES`; equal calls give equal weights.

    Args:
        shape: its name.
        device: cpu or cuda.
        dtype: of the weights; bfloat16 on a GPU and float32 on a CPU where not given.
    """
    pin_arithmetic()
    attention.register()
    config = GPT2Config(**SHAPES[shape])
    chosen = _DTYPES[device] if dtype is None else dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention.ATTENTION_NAME
        )
    assert isinstance(model, PreTrainedModel)
    model.eval()
    model.requires_grad_(requires_grad=False)
    model.config.pad_token_id = None
    nn.Module.to(model, device, chosen)
    return LoadedModel(
        model=model,
        tokenizer=_tokenizer(config.vocab_size),
        name=shape,
        device=model.device,
        dtype=chosen,
        max_positions=config.n_positions,
        vocab_size=config.vocab_size,
        eos_token_ids=frozenset({config.vocab_size - 1}),
        fingerprint="0" * 24,
    )


def save_random_model(shape: str, folder: Path) -> None:
    """Write one of the `SHAPES` as a folder that anything reads which reads transformers models."""
    loaded = random_model(shape, "cpu")
    # It would draw over whatever shows how the measuring goes.
    disable_progress_bar()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word for each token id."""
    first = "w0"
    words = {f"w{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=first))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
