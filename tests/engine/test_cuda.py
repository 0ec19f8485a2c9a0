"""On a GPU the noise has the CPU's bits, company changes nothing, and no way of running does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.serving import (
    TABLE,
    loaded_model,
    mixed_sequences,
    sequences,
    serve,
)
from tests.engine.test_engine import generated_alone
from tests.tiny_models import KINDS, Kind, tiny_config, tiny_model

from shoal_worker.engine import Engine
from shoal_worker.engine.options import EngineOptions
from shoal_worker.engine.random import gumbel, row_keys, token_bits
from shoal_worker.engine.sampling import in_order, likeliest, log_probabilities
from shoal_worker.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PLAIN = EngineOptions(cuda_graphs=False, kernels=False, decode_steps=1, run_ahead=False)
WAYS: dict[str, dict[str, Any]] = {
    "as it is by default": {},
    "without graphs": {"cuda_graphs": False},
    "without kernels": {"kernels": False},
    "read at once": {"run_ahead": False, "decode_steps": 1},
    "many steps at once": {"decode_steps": 7},
}


def test_noise_has_the_same_bits_as_on_the_cpu() -> None:
    seeds = torch.tensor([0, 42, 2**63 - 1])
    numbers = torch.arange(3)
    ids = torch.arange(50_257)
    keys = row_keys(seeds, numbers, numbers)

    keys_there = row_keys(seeds.cuda(), numbers.cuda(), numbers.cuda())

    assert torch.equal(keys_there.cpu(), keys)
    assert torch.equal(token_bits(keys_there, ids.cuda()).cpu(), token_bits(keys, ids))
    torch.testing.assert_close(gumbel(keys_there, ids.cuda()).cpu(), gumbel(keys, ids))


@pytest.mark.parametrize("num_tokens", [1, 50, 1000, 50_257])
def test_order_among_equals_is_the_cpu_s(num_tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_257, generator=draw).to(torch.bfloat16).float()

    values, ids = in_order(logits.cuda(), num_tokens)

    expected_values, expected_ids = in_order(logits, num_tokens)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)
    assert torch.equal(likeliest(logits.cuda()).cpu(), expected_ids[:, 0])


@pytest.mark.parametrize("num_rows", [1, 7, 16, 64, 512])
def test_log_probabilities_do_not_depend_on_a_row_s_address(num_rows: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    row = torch.randn(1, 50_257, generator=draw, device="cuda")
    tokens = torch.full((num_rows,), 9, device="cuda")

    chosen, top, _ = log_probabilities(row.repeat(num_rows, 1), tokens, 20)

    assert (chosen == chosen[0]).all()
    assert (top == top[0]).all()
    assert torch.equal(chosen[:1], log_probabilities(row, tokens[:1], 20)[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_in_float32_are_those_of_generate(kind: Kind, way: str) -> None:
    served = sequences()

    serve(Engine(loaded_model(kind, device="cuda"), TABLE, EngineOptions(**WAYS[way])), served)

    model = tiny_model(tiny_config(kind))
    for one in served:
        assert one.output_token_ids == generated_alone(model, one)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_company_changes_no_bit_on_a_gpu(kind: Kind, dtype: torch.dtype, way: str) -> None:
    loaded = loaded_model(kind, dtype=dtype, device="cuda")
    together, alone = every_kind_of_row(), every_kind_of_row()
    engine = Engine(loaded, TABLE, EngineOptions(**WAYS[way]))
    serve(engine, together)

    for one in alone:
        serve(engine, [one])
        other = together[one.key.request_index]
        assert other.output_token_ids == one.output_token_ids
        assert other.output_logprobs == one.output_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_and_steps_at_once_change_no_token(dtype: torch.dtype) -> None:
    loaded = loaded_model(dtype=dtype, device="cuda")
    plain, default = every_kind_of_row(), every_kind_of_row()
    without_graphs = EngineOptions(cuda_graphs=False, decode_steps=1, run_ahead=False)

    serve(Engine(loaded, TABLE, without_graphs), plain)
    serve(Engine(loaded, TABLE), default)

    for one, other in zip(plain, default, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


# torch's compiler warns of torch's own use of what it deprecates.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_compiled_step_gives_generate_s_greedy_tokens_in_any_company(kind: Kind) -> None:
    engine = Engine(loaded_model(kind, device="cuda"), TABLE, EngineOptions(compile=True))
    served, alone = sequences(logprobs=2), sequences(logprobs=2)[::3]

    serve(engine, served)
    for one in alone:
        serve(engine, [one])

    model = tiny_model(tiny_config(kind))
    for one in served:
        assert one.output_token_ids == generated_alone(model, one)
    for one in alone:
        assert one.output_logprobs == served[one.key.request_index].output_logprobs


def test_kernels_and_functions_draw_the_same_in_float32() -> None:
    loaded = loaded_model(device="cuda")
    plain, default = every_kind_of_row(), every_kind_of_row()

    serve(Engine(loaded, TABLE, PLAIN), plain)
    serve(Engine(loaded, TABLE), default)

    for one, other in zip(plain, default, strict=True):
        assert one.output_token_ids == other.output_token_ids


def test_warming_up_leaves_no_trace_on_a_gpu() -> None:
    loaded = loaded_model(device="cuda")
    warm, cold = every_kind_of_row(), every_kind_of_row()
    engine = Engine(loaded, TABLE)

    engine.warm_up()
    serve(engine, warm)
    serve(Engine(loaded, TABLE), cold)

    for one, other in zip(warm, cold, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_another_gpu_than_the_current_one_draws_the_same(way: str) -> None:
    options = EngineOptions(**WAYS[way])
    here, there = every_kind_of_row(), every_kind_of_row()
    engine = Engine(loaded_model(device="cuda:1"), TABLE, options)

    engine.warm_up()
    serve(engine, there)
    serve(Engine(loaded_model(device="cuda:0"), TABLE, options), here)

    for one, other in zip(here, there, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


def every_kind_of_row() -> list[Sequence]:
    """Rows that a step draws by itself next to rows that it does not."""
    inside = sequences(temperature=0.9, top_k=40, top_p=0.9)
    rows = [*mixed_sequences(), *inside, *sequences()]
    for index, one in enumerate(rows):
        one.key = one.key._replace(request_index=index)
    return rows
