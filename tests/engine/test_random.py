"""The noise is a pure function with known bits, and is distributed as it should be."""

from __future__ import annotations

import math

import torch
from tests.engine.reference import GAMMA, MASK, mixed, reference_bits, reference_gumbel

from shoal_worker.engine.random import gumbel, row_keys, token_bits

MAX_SEED = 2**63 - 1


def bits_of(seed: int, sample: int, position: int, token_id: int) -> int:
    keys = row_keys(torch.tensor([seed]), torch.tensor([sample]), torch.tensor([position]))
    return int(token_bits(keys, torch.tensor([token_id])).item()) & MASK


def test_the_first_output_is_the_published_one_of_splitmix64() -> None:
    # Seed 0 gives this first number in every implementation of SplitMix64.
    assert mixed(GAMMA) == 0xE220A8397B1DCDAF
    assert int(token_bits(torch.tensor([0]), torch.tensor([0])).item()) & MASK == mixed(GAMMA)


def test_bits_never_change_between_releases() -> None:
    assert bits_of(0, 0, 0, 0) == 0x2130748AAAC80268
    assert bits_of(42, 0, 0, 50256) == 0xA85B31B9087D117E
    assert bits_of(42, 3, 511, 17) == 0x52CC866E9371255E
    assert bits_of(MAX_SEED, 127, 131071, 2**31 - 1) == 0xAF12C4C98B756945


def test_bits_follow_the_definition_on_plain_integers() -> None:
    for numbers in [(0, 0, 0, 0), (7, 1, 2, 3), (MAX_SEED, 127, 4095, 151_935), (2**62, 0, 1, 9)]:
        assert bits_of(*numbers) == reference_bits(*numbers)


def test_noise_follows_the_definition_on_plain_floats() -> None:
    keys = row_keys(torch.tensor([7]), torch.tensor([1]), torch.tensor([2]))

    noise = gumbel(keys, torch.arange(50))[0].tolist()

    for token_id, value in enumerate(noise):
        assert abs(value - reference_gumbel(7, 1, 2, token_id)) < 1e-13


def test_noise_of_a_token_depends_on_neither_row_nor_company_nor_order() -> None:
    seeds, samples, positions = torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2]), torch.arange(3)
    keys = row_keys(seeds, samples, positions)
    everything = gumbel(keys, torch.arange(1000))
    ids = torch.tensor([[999, 3, 500], [0, 1, 2], [7, 7, 8]])

    picked = gumbel(keys, ids)
    alone = gumbel(keys[1:2], torch.tensor([2]))

    assert torch.equal(picked, everything.gather(1, ids))
    assert alone.item() == everything[1, 2].item()


def test_each_of_seed_sample_position_and_token_changes_the_bits() -> None:
    different = {
        bits_of(1, 1, 1, 1),
        bits_of(2, 1, 1, 1),
        bits_of(1, 2, 1, 1),
        bits_of(1, 1, 2, 1),
        bits_of(1, 1, 1, 2),
    }
    assert len(different) == 5


def test_noise_is_finite_at_both_ends_of_the_uniform() -> None:
    smallest, largest = 0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52

    assert smallest > 0
    assert largest < 1
    assert math.isfinite(-math.log(-math.log(smallest)))
    assert math.isfinite(-math.log(-math.log(largest)))


def test_noise_has_the_mean_and_variance_of_a_gumbel() -> None:
    keys = row_keys(torch.arange(100), torch.zeros(100).long(), torch.zeros(100).long())
    noise = gumbel(keys, torch.arange(10_000))

    # Six standard errors of a million draws.
    assert abs(noise.mean().item() - 0.5772156649) < 0.008
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02


def test_neighbouring_positions_and_tokens_are_uncorrelated() -> None:
    keys = row_keys(torch.zeros(100).long(), torch.zeros(100).long(), torch.arange(100))
    noise = gumbel(keys, torch.arange(10_000)) - 0.5772156649

    across_tokens = (noise[:, 1:] * noise[:, :-1]).mean().item()
    across_positions = (noise[1:] * noise[:-1]).mean().item()

    assert abs(across_tokens) < 0.01
    assert abs(across_positions) < 0.01
