"""The drawing kernel means what the functions over tensors mean, ties and all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal_worker.engine.params import RowParams
from shoal_worker.engine.sampling import draw_in_order, in_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MAX_TOP_K = 64
ROWS = 256


def params_of(seed: int) -> RowParams:
    draw = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(ROWS, generator=draw, dtype=torch.float64)

    def some(values: Tensor, otherwise: float) -> Tensor:
        return torch.where(uniform() < 0.5, values, otherwise)

    params = RowParams(
        temperature=uniform() * 2 + 0.05,
        top_k=torch.randint(1, MAX_TOP_K + 1, (ROWS,), generator=draw),
        top_p=some(uniform().clamp_min(0.01), 1.0),
        log_min_p=some(uniform().log(), -torch.inf),
        seed=torch.randint(0, 2**63 - 1, (ROWS,), generator=draw),
        sample=torch.randint(0, 5, (ROWS,), generator=draw),
    )
    return RowParams(**{name: getattr(params, name).cuda() for name in RowParams.__slots__})


def logits_of(kind: str, vocab_size: int) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(vocab_size)
    logits = torch.randn(ROWS, vocab_size, generator=draw, device="cuda").mul_(3)
    if kind == "ties":
        return logits.round_()
    if kind == "equal":
        return logits.zero_().index_fill_(1, torch.tensor([7], device="cuda"), -0.0)
    if kind == "low":
        return logits.sub_(100)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "low", "ties", "equal"])
@pytest.mark.parametrize("vocab_size", [320, 50_257, 151_936])
def test_the_kernel_draws_what_the_functions_draw(
    vocab_size: int, kind: str, dtype: torch.dtype
) -> None:
    from shoal_worker.engine.triton_draw import draw

    logits = logits_of(kind, vocab_size).to(dtype)
    params = params_of(vocab_size)
    positions = torch.arange(ROWS, device="cuda")

    tokens = draw(logits, params, positions)

    values, ids = in_order(logits.float(), MAX_TOP_K)
    assert torch.equal(tokens, draw_in_order(values, ids, params, positions))


def test_rows_may_be_views_of_wider_ones() -> None:
    from shoal_worker.engine.triton_draw import draw

    wide = torch.full((ROWS, 512), 1e9, device="cuda")
    wide[:, :320] = logits_of("random", 320)
    params, positions = params_of(0), torch.arange(ROWS, device="cuda")

    tokens = draw(wide[:, :320], params, positions)

    assert torch.equal(tokens, draw(wide[:, :320].contiguous(), params, positions))


def test_noise_decides_as_the_weights_say() -> None:
    from shoal_worker.engine.triton_draw import draw

    weights = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    num_draws = 200_000
    logits = weights.log().float().cuda().expand(num_draws, 4).contiguous()
    ones = torch.ones(num_draws, dtype=torch.float64, device="cuda")
    params = RowParams(
        temperature=ones,
        top_k=torch.full_like(ones, 4, dtype=torch.int64),
        top_p=ones,
        log_min_p=-torch.inf * ones,
        seed=torch.arange(num_draws, device="cuda"),
        sample=torch.zeros_like(ones, dtype=torch.int64),
    )

    tokens = draw(logits, params, torch.zeros_like(params.seed))

    expected = weights * num_draws
    counts = torch.bincount(tokens.cpu(), minlength=4)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand
