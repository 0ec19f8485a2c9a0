"""What int8 keys and values change: `python -m shoal_worker.bench.cache_formats --help`.

The model completes prompts at temperature 1, then reads each whole text token by token with either
cache, so that both speak of the same tokens.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from shoal_worker.engine import LoadedModel, load_model
from shoal_worker.engine.cache import LaneCache, TokenWrite
from shoal_worker.engine.forward import next_logits
from shoal_worker.engine.options import KVDType
from shoal_worker.engine.probe import probe


@torch.inference_mode()
def log_probabilities(
    loaded: LoadedModel, texts: Tensor, num_given: Tensor, kv_dtype: KVDType
) -> Tensor:
    """Read texts token by token, and draw those tokens that are not given.

    Args:
        texts: `[rows, length]`; what is not given is filled in.
        num_given: `[rows]`.

    Returns:
        `[rows, length - 1, vocab]`, of the token after each position.
    """
    shapes = probe(loaded.model)
    if kv_dtype == "int8":
        shapes = tuple(shape.as_int8() for shape in shapes)
    rows, length = texts.shape
    cache = LaneCache(shapes, rows, length, loaded.device)
    steps = []
    for position in range(length - 1):
        positions = torch.full((rows,), position)
        cache.write = TokenWrite(positions)
        logits = next_logits(loaded.model, texts[:, position], positions, cache)
        steps.append(logits.float().log_softmax(-1))
        drawn = steps[-1].exp().multinomial(1)[:, 0]
        following = texts[:, position + 1]
        following.copy_(torch.where(num_given > position + 1, following, drawn))
    return torch.stack(steps, dim=1)


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True
)
@click.option("--max-tokens", default=64, show_default=True)
def main(model: str, prompts: Path, max_tokens: int) -> None:
    """Print the loss with either cache, and how often both find the same token likeliest."""
    loaded = load_model(model, device="cpu")
    ids = [loaded.tokenizer(line).input_ids for line in prompts.read_text().splitlines() if line]
    num_given = torch.tensor([len(row) for row in ids])
    texts = torch.zeros(len(ids), int(num_given.max()) + max_tokens, dtype=torch.int64)
    for row, given in enumerate(ids):
        texts[row, : len(given)] = torch.tensor(given)
    torch.manual_seed(0)
    plain = log_probabilities(loaded, texts, num_given, "auto")
    small = log_probabilities(loaded, texts, torch.full_like(num_given, texts.shape[1]), "int8")
    click.echo(f"{texts[:, 1:].numel()} tokens of {len(ids)} texts, {loaded.name} {loaded.dtype}")
    for name, logs in (("auto", plain), ("int8", small)):
        loss = -logs.gather(2, texts[:, 1:, None]).double().mean().item()
        click.echo(f"loss with {name}: {loss:.5f}")
    same = (plain.argmax(-1) == small.argmax(-1)).double().mean().item()
    click.echo(f"the same token is likeliest at {same:.2%} of positions")


if __name__ == "__main__":
    main()
