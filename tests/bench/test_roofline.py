"""What the hardware allows, by hand on a model of round numbers."""

from __future__ import annotations

import pytest

from shoal_worker.bench.roofline import Ceilings, Lengths, ModelSize, step_s, workload_s

SIZE = ModelSize(
    block_weights=600,
    output_weights=400,
    bytes_per_weight=2,
    layers=2,
    attention_width=10,
    kv_bytes_per_token=80,
)
SLOW_MEMORY = Ceilings(bytes_per_s=1.0, operations_per_s=1e9)
SLOW_PRODUCTS = Ceilings(bytes_per_s=1e9, operations_per_s=1.0)


def test_a_step_reads_the_weights_once_and_every_live_position() -> None:
    assert step_s(SIZE, SLOW_MEMORY, rows=3, context=5) == 2000 + 3 * 5 * 80


def test_a_step_computes_for_every_row() -> None:
    products, attention = 2 * 3 * 1000, 4 * 2 * 10 * 3 * 5

    assert step_s(SIZE, SLOW_PRODUCTS, rows=3, context=5) == products + attention


def test_the_slower_of_memory_and_products_decides() -> None:
    even = Ceilings(bytes_per_s=1.0, operations_per_s=2.0)

    assert step_s(SIZE, even, rows=1, context=1) == 2000 + 80
    assert step_s(SIZE, even, rows=10, context=1) == (2 * 10 * 1000 + 80 * 10) / 2


def test_a_workload_s_steps_are_as_full_as_the_slots_allow() -> None:
    sequences = [Lengths(prompt=4, new=3)] * 4
    # The second token is made of 5 positions, the third of 6.
    live = 4 * (5 + 6) * 80

    assert workload_s(SIZE, SLOW_MEMORY, sequences, slots=4) == pytest.approx(2 * 2000 + live)
    assert workload_s(SIZE, SLOW_MEMORY, sequences, slots=2) == pytest.approx(4 * 2000 + live)


def test_the_longest_sequence_needs_a_step_for_each_of_its_tokens() -> None:
    sequences = [Lengths(prompt=1, new=11), Lengths(prompt=1, new=1)]
    live = sum(range(2, 12)) * 80

    assert workload_s(SIZE, SLOW_MEMORY, sequences, slots=2) == pytest.approx(10 * 2000 + live)


def test_a_prompt_needs_the_output_layer_once_and_attends_to_what_precedes() -> None:
    [one] = sequences = [Lengths(prompt=3, new=1)]
    attention = 4 * 2 * 10 * (1 + 2 + 3)

    assert workload_s(SIZE, SLOW_PRODUCTS, sequences, slots=1) == (
        2 * (one.prompt * 600 + 400) + attention
    )
